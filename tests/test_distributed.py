"`Learner.distrib_ctx` on two CPU processes with a mixer: the ranks stay in step, see different data and mix it differently"
import pytest, torch
from helpers import begin_rank, run_ranks, save_rank

cases = 'plain','mixup'

@pytest.fixture(scope='module')
def ranks(tmp_path_factory): return run_ranks(__file__, tmp_path_factory.mktemp('distrib'))

@pytest.mark.parametrize('case', cases)
def test_in_step(ranks, case):
    a,b = [r[case] for r in ranks]
    assert (a['world'],a['backend']) == (b['world'],b['backend']) == (2,'gloo')
    assert len(a['recs']) == len(b['recs']) == 12
    assert {o['model'] for o in a['recs']+b['recs']} == {'DistributedDataParallel'}
    for p,q in zip(a['params'], b['params'], strict=True): assert p.equal(q)
    for o,p in zip(a['recs'], b['recs']): assert o['grad'].equal(p['grad'])
    assert a['values'] == b['values'] # fastai gathers what it shows: losses and metrics are of both ranks

@pytest.mark.parametrize('case', cases)
def test_different_data(ranks, case):
    a,b = [r[case]['recs'] for r in ranks]
    for o,p in zip(a, b): assert not o['x'].equal(p['x']) and o['loss'] != p['loss']
    for e in 0,6: # In each epoch the two ranks share out the training set, with no item twice
        assert torch.cat([o['x'] for r in (a,b) for o in r[e:e+6]]).unique(dim=0).shape == (48,4)

def test_ranks_with_one_seed_draw_different_lam(ranks):
    a,b = [r['mixup']['recs'] for r in ranks]
    assert len(a[0]['lam'])==len(b[0]['lam'])==4
    assert not any(o['lam'].equal(p['lam']) for o,p in zip(a, b))
    assert not a[0]['lam'].equal(a[1]['lam'])

# What each rank runs. fastai's loader shares out its indices by way of CUDA, which a CPU run has to go round
if __name__=='__main__':
    out,rank = begin_rank()
    from fastai.basics import *
    from fastai.distributed import *
    from fastmix.mixers import MixUp

    @patch
    def _broadcast(self:DistributedDL, t, rank):
        "As in fastai, without the `.cuda()`, which gloo does not need"
        t = LongTensor(t)
        torch.distributed.broadcast(t, rank)
        return t.tolist()

    class Probe(Callback):
        "Record what each training batch was made of, before any mixing, and the gradient it led to"
        order,run_valid = -1,False
        def before_fit(self): self.recs = []
        def before_batch(self): self.recs.append(dict(x=self.x.clone(), model=type(self.model).__name__))
        def after_loss(self): self.recs[-1].update(loss=self.loss.item(), lam=self.learn.mix_up.lam if hasattr(self.learn, 'mix_up') else None)
        def before_step(self): self.recs[-1]['grad'] = torch.cat([p.grad.flatten() for p in self.model.parameters()])

    def run(*cbs):
        set_seed(42)
        ds = list(zip(torch.randn(64,4), torch.randint(0, 3, (64,))))
        dls = DataLoaders.from_dsets(ds[:48], ds[48:], bs=4, device='cpu', num_workers=0)   # a process with gloo's threads had better not fork
        model = nn.Sequential(nn.Linear(4,8), nn.ReLU(), nn.Linear(8,3))
        learn,probe = Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy),Probe()
        with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(2, lr=0.1, cbs=[probe,*cbs])
        params,values = [p.detach() for p in learn.model.parameters()],[list(o) for o in learn.recorder.values]
        world,backend = torch.distributed.get_world_size(),torch.distributed.get_backend()
        return dict(recs=probe.recs, params=params, values=values, world=world, backend=backend)

    torch.distributed.init_process_group('gloo', init_method=f'file://{out}/init', rank=rank, world_size=2)
    save_rank(dict(plain=run(), mixup=run(MixUp(.4))), out, rank)
