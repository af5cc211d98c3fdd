"The plain loop under Accelerate on two CPU processes, with the batch mixed in the loop, or by `MixCollate` in the loader"
import pytest, torch, torch.nn.functional as F
from torch import nn
from helpers import begin_rank, run_ranks, save_rank

ways = 'loop','collate'
def mk_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

@pytest.fixture(scope='module')
def ranks(tmp_path_factory): return run_ranks(__file__, tmp_path_factory.mktemp('accelerate'))

def sample_losses(model, o):
    "λ l(f(λx + (1-λ)x1), y) + (1-λ) l(f(λx + (1-λ)x1), y1), one sample after the other"
    res = []
    for i,(lam,j) in enumerate(zip(o['lam'], o['idx'])):
        p = model(lam*o['x'][i] + (1-lam)*o['x'][j])[None]
        res.append(lam*F.cross_entropy(p, o['y'][i:i+1]) + (1-lam)*F.cross_entropy(p, o['y'][j:j+1]))
    return torch.stack(res)

@pytest.mark.parametrize('way', ways)
def test_as_one_process_would_train(ranks, way):
    "Each step's losses are the exact ones, and the parameters move as by the mean over both ranks"
    model = mk_model()
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    a,b = [r[way] for r in ranks]
    assert len(a['recs'])==len(b['recs'])==24
    for steps in zip(a['recs'], b['recs']):
        means = [sample_losses(model, o).mean() for o in steps]
        for mean,o in zip(means, steps): assert mean.item()==pytest.approx(o['loss'], abs=1e-5)
        (sum(means)/2).backward()
        opt.step()
        opt.zero_grad()
    for p,q,r in zip(model.parameters(), a['params'], b['params']): assert q.equal(r) and torch.allclose(p, q, atol=1e-5)

@pytest.mark.parametrize('way', ways)
def test_ranks_see_other_data_and_mix_it_otherwise(ranks, way):
    a,b = [r[way]['recs'] for r in ranks]
    for epoch in range(2): assert torch.cat([o['x'] for r in (a,b) for o in r[12*epoch:12*epoch+12]]).unique(dim=0).shape[0] == 192
    lams = torch.stack([o['lam'] for o in a+b])
    assert len(lams.unique(dim=0)) == len(lams)

@pytest.mark.parametrize('way', ways)
def test_it_learns(ranks, way):
    first,last = [sum(o['loss'] for r in ranks for o in r[way]['recs'][s]) for s in (slice(0,12),slice(12,24))]
    assert last<first

if __name__=='__main__':
    out,rank = begin_rank()
    from accelerate import Accelerator
    from sklearn.datasets import load_digits
    from torch.utils.data import DataLoader, TensorDataset, default_collate
    from fastmix.loop import MixCollate
    from fastmix.losses import MixLoss
    from fastmix.mixers import MixUp

    class Keep(MixCollate):
        "Keeps the samples beside their mixtures"
        def __call__(self, samples): return default_collate(samples)[0],super().__call__(samples)

    def loader(ds, collate_fn=None): return DataLoader(ds, 8, shuffle=True, collate_fn=collate_fn, generator=torch.Generator().manual_seed(3))
    def train(way):
        torch.manual_seed(2)
        x,y = load_digits(return_X_y=True)
        ds,model = TensorDataset(torch.tensor(x[:192]).float()/16, torch.tensor(y[:192])),mk_model()
        accelerator,mixer,loss,recs = Accelerator(cpu=True),MixUp(1.),MixLoss(nn.CrossEntropyLoss()),[]
        dl = loader(ds, Keep(mixer) if way=='collate' else None)
        model,opt,dl = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=.1), dl)
        for _ in range(2):
            for b in dl:
                if way=='collate': x,((mixed,y),plan) = b
                else:
                    x,y = b
                    plan = mixer.draw(x)
                    mixed = plan.mix(x)
                value = loss(model(mixed), y, plan=plan)
                recs.append(dict(x=x, y=y, lam=plan.lam, idx=plan.idx, loss=value.item()))
                accelerator.backward(value)
                opt.step()
                opt.zero_grad()
        assert accelerator.num_processes==2 and type(model).__name__=='DistributedDataParallel'
        return dict(recs=recs, params=[p.detach() for p in model.parameters()])
    save_rank({way: train(way) for way in ways}, out, rank)
