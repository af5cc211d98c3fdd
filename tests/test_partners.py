"Who meets whom: functions of the targets, the user's own, and a second loader"
import pickle, warnings
from functools import partial
import numpy as np, pytest, torch
from fastai.data.load import DataLoader
from fastai.torch_core import set_seed
from torch import nn, tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader as TorchLoader
from fastmix.callback import CutMix, MixUp, OneOf, ResizeMix
from fastmix.check import check_mix
from fastmix.core import balanced, derange, draw_partners, near_target, other_class, same_class
from fastmix.data import SecondLoader
from fastmix.loss import MixLoss
from fastmix.mixes import Blend, Cut, FourierCut, ResizeCut
from helpers import Record, class_dls, mk_dls, mk_learn

rng = np.random.default_rng(0)
y = tensor([0,0,0,0,1,1,1,2,2,3])
x = torch.zeros(10, 2)
def often(f, y, n=4000):
    "How often j is i's partner"
    counts = torch.zeros(len(y), len(y), dtype=torch.float64)
    for _ in range(n): counts[torch.arange(len(y)), f((x[:len(y)],), (y,), rng)] += 1
    return counts/n

def even(allowed):
    "All that are allowed equally likely, and a sample itself where none is"
    w = allowed.double()
    w[w.sum(1)==0] = torch.eye(len(w), dtype=w.dtype)[w.sum(1)==0]
    return w/w.sum(1, keepdim=True)

same = y[:,None]==y
@pytest.mark.parametrize('f,allowed', [(derange, ~torch.eye(10).bool()), (same_class, same & ~torch.eye(10).bool()), (other_class, ~same)])
def test_rules(f, allowed): assert (often(f, y)-even(allowed)).abs().max() < .04

def test_a_derangement_uses_each_sample_once():
    for n in range(2, 9):
        idx = derange((torch.zeros(n),), (), rng)
        assert idx.sort().values.equal(torch.arange(n)) and (idx!=torch.arange(n)).all()
    assert derange((torch.zeros(1),), (), rng).tolist()==[0]

def test_balanced_draws_classes_evenly():
    want = torch.tensor([1/4/(y==c).sum().item() for c in y], dtype=torch.float64).expand(10, 10)
    assert (often(balanced, y)-want).abs().max() < .04

@pytest.mark.parametrize('bandwidth', [.1, .5, 3.])
@pytest.mark.parametrize('shape', [(7,), (7,1), (7,2)], ids=str)
def test_near_targets_are_likelier(bandwidth, shape):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    z = t.double().reshape(7, -1).numpy()
    sd2 = z.var(0).sum()
    w = np.array([[0 if i==j else np.exp(-((z[i]-z[j])**2).sum()/(2*bandwidth**2*sd2)) for j in range(7)] for i in range(7)])
    assert np.abs(often(partial(near_target, bandwidth=bandwidth), t).numpy() - w/w.sum(1, keepdims=True)).max() < .04

def test_near_targets_far_away():
    "The nearest is met, however far; equal targets are met equally"
    far = tensor([0.,1e6,3e6,3e6+1])
    assert (often(partial(near_target, bandwidth=1e-4), far, 50).argmax(1)==tensor([1,0,3,2])).all()
    assert (often(near_target, torch.ones(4))-even(~torch.eye(4).bool())).abs().max() < .04
    assert near_target((), (torch.ones(1),), rng).tolist()==[0]

@pytest.mark.parametrize('f,bad', [(same_class, torch.rand(4)), (other_class, torch.zeros(4,2).long()), (balanced, torch.rand(4,2)), (near_target, torch.arange(4))])
def test_targets_of_the_wrong_kind(f, bad):
    with pytest.raises(ValueError, match=f.__name__): f((x[:4],), (bad,), rng)
    with pytest.raises(ValueError, match=f.__name__): f((x[:4],), (), rng)

@pytest.mark.parametrize('f,kinds', [(derange, ('classes','labels','numbers','masks','maps')), (same_class, ('classes',)), (other_class, ('classes',)),
    (balanced, ('classes',)), (near_target, ('labels','numbers','maps'))])
@pytest.mark.parametrize('mixer', [MixUp, CutMix, ResizeMix, partial(MixUp, k=3), partial(CutMix, per_batch=True)])
def test_every_mixer_tells_the_truth(f, kinds, mixer):
    for kind in kinds: assert check_mix(mixer(partners=f), kind, n_batches=3) < 1e-6

def test_in_a_learner():
    learn = mk_learn(class_dls(), cbs=[MixUp(1., partners=other_class), record := Record()])
    learn.fit(2, .1)
    for b in record.batches: assert (b['yb'][0][b['plan'].idx] != b['yb'][0]).all()
    a = [b['plan'].idx for b in record.batches]
    learn.dls = class_dls()
    set_seed(0)
    learn.fit(2, .1)
    b = [b['plan'].idx for b in record.batches]
    learn.dls = class_dls()
    set_seed(0)
    learn.fit(2, .1)
    assert any(not i.equal(j) for i,j in zip(a, a[1:])) and all(i.equal(p['plan'].idx) for i,p in zip(b, record.batches))

@pytest.mark.parametrize('answer', [lambda xb,yb,rng: torch.arange(1, 9), lambda xb,yb,rng: -torch.arange(8), lambda xb,yb,rng: torch.zeros(7).long(),
    lambda xb,yb,rng: torch.zeros(8), lambda xb,yb,rng: torch.zeros(8, 1).long(), lambda xb,yb,rng: torch.zeros(8)>1])
def test_a_wrong_answer_is_told(answer):
    learn = mk_learn(class_dls(), cbs=MixUp(.4, partners=answer))
    own = learn.loss_func
    with pytest.raises(ValueError, match='partners must give each of the 8 samples a position'): learn.fit(1)
    learn.remove_cb(MixUp)
    assert learn.loss_func is own

def test_not_a_function():
    with pytest.raises(TypeError, match='SecondLoader.*str'): MixUp(.4, partners='derange')
    with pytest.raises(TypeError, match='SecondLoader.*TfmdDL'): MixUp(.4, partners=class_dls().train)

# A second loader

def second(n=12, bs=5, shift=100., labels=True, n_in=6, **kwargs):
    g = torch.Generator().manual_seed(9)
    xs,ys = torch.randn(n, n_in, generator=g)+shift, torch.randint(0, 4, (n,), generator=g)
    return DataLoader(list(zip(xs, ys)) if labels else [(o,) for o in xs], bs=bs, num_workers=0, **kwargs)

def soft(y): return nn.functional.one_hot(y, 4).float()

@pytest.mark.parametrize('k', [2,3])
@pytest.mark.parametrize('n,bs', [(12,5), (3,3), (40,16), (1,1)])
def test_partners_come_from_the_second_loader(n, bs, k):
    "Shorter or longer than the first, with batches of any size: each mixture is λ of its own and 1-λ of the others'"
    learn = mk_learn(class_dls(), cbs=[MixUp(1., k=k, partners=SecondLoader(second(n, bs))), record := Record()])
    learn.fit(2, .1)
    plans = [b['plan'] for b in record.batches]
    assert all(o.n in {8+bs, 8+(n%bs or bs)} and (o.pairs[:,1:]>=8).all() for o in plans)
    for b in record.batches:
        own = b['plan'].shares[:,:1]
        theirs = (b['mixed'][0] - own*b['xb'][0])/(1-own).clamp_min(1e-3)
        assert len(b['mixed'][0])==8 and ((theirs>90) | (own>.99)).all()

def test_the_loss_and_the_batch_are_the_second_loader_s():
    dl = second(10, 5)
    (x2,y2),(x1,y1) = next(iter(dl)), (torch.randn(8, 6), torch.randint(0, 4, (8,)))
    (xp,),(yp,) = SecondLoader(dl).beside((x1,), (y1,))
    assert xp.equal(torch.cat([x1,x2])) and yp.equal(torch.cat([y1,y2]))
    plan = Blend(1.).draw(xp, bs=8)
    lam,j,pred = plan.lam, plan.idx-8, torch.randn(8, 4)
    assert_close(plan.mix(xp), lam[:,None]*x1 + (1-lam[:,None])*x2[j])
    want = -((lam[:,None]*soft(y1) + (1-lam[:,None])*soft(y2[j]))*pred.log_softmax(1)).sum(1).mean()
    assert_close(MixLoss(nn.CrossEntropyLoss())(pred, yp, plan=plan), want)
    assert_close(MixLoss(nn.MSELoss())(pred, soft(yp), plan=plan), (pred-lam[:,None]*soft(y1)-(1-lam[:,None])*soft(y2[j])).square().mean())

@pytest.mark.parametrize('mix', [Blend(1.), Blend(1., k=3), Cut(), ResizeCut(), FourierCut(), Cut(per_batch=True)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize('size', [(6,7), (200,190)], ids=str)
def test_a_mix_of_some_rows_is_that_of_all(mix, dtype, size):
    "The first rows alone, mixed from all of them, as the same plan does where all are mixed"
    x = (torch.rand(9, 3, *size)*200).to(dtype)
    for o in (x, x.contiguous(memory_format=torch.channels_last)):
        plan = mix.draw(o, bs=4)
        got,kept = plan.mix(o), o.clone()
        assert got.shape==(4,3,*size) and o.equal(kept) and (plan.idx>=4).all()
        full = mix.draw(o)
        vars(full).update({k: (v if len(v)==1 else torch.cat([v, v, v])[:9]) for k,v in vars(plan).items() if isinstance(v, torch.Tensor)})
        full.pairs[:,0] = torch.arange(9)
        assert_close(got.float(), full.mix(o)[:4].float())

@pytest.mark.parametrize('kind', ['classes','labels','numbers','masks','maps'])
@pytest.mark.parametrize('mixer', [MixUp, CutMix, ResizeMix, lambda **kw: OneOf(MixUp(.4, k=3), CutMix(), **kw)])
def test_a_second_loader_and_a_batch_tell_the_truth(mixer, kind):
    from fastmix.check import _target
    v = (torch.rand(30, generator=torch.Generator().manual_seed(3))<.5).float()
    items = list(zip(v.view(-1, 1, 1, 1).expand(-1, 3, 16, 16), _target(kind, v, (16,16))))
    assert check_mix(mixer(partners=SecondLoader(DataLoader(items, bs=7, shuffle=True, num_workers=0))), kind, n_batches=6) < 1e-6

@pytest.mark.parametrize('mixer', [MixUp, partial(MixUp, k=3), partial(MixUp, p=.5), lambda alpha, **kw: OneOf(MixUp(alpha), None, per_batch=False, **kw)])
def test_without_targets_padded_texts_keep_their_own(mixer):
    "Also where mixtures are put in the order of their length"
    g = torch.Generator().manual_seed(0)
    x,partners = torch.randint(1, 33, (32,5), generator=g),[(torch.randint(1, 33, (8,5), generator=g),)]
    x[:,0] = torch.arange(1, 33)   # all different
    for o,n in zip(x, torch.randint(1, 6, (32,), generator=g)): o[n:] = 0
    model = nn.Sequential(nn.Embedding(33, 4, padding_idx=0), nn.Flatten(), nn.Linear(20, 32))
    learn = mk_learn(mk_dls([x], [torch.arange(32)]), model, cbs=[mixer(1e-6, partners=SecondLoader(partners)), record := Record()])
    with learn.no_logging(): learn.fit(1, lr=0.)
    places = []
    for b in record.batches:   # with so small an α each mixture is one of the batch
        same = (model(b['xb'][0])[None]-b['pred'][:,None]).abs().sum(-1) < 1e-4
        assert same.any(1).all()
        places += same.int().argmax(1)
        assert_close(b['loss'], nn.functional.cross_entropy(b['pred'].detach(), b['yb'][0][same.int().argmax(1)]))
    assert places!=[*range(8)]*4   # some were moved

def test_without_targets_a_sample_keeps_its_own():
    learn = mk_learn(class_dls(), cbs=[MixUp(1., partners=SecondLoader(second(labels=False))), record := Record()])
    learn.fit(1, .1)
    for b in record.batches: assert_close(b['loss'], nn.functional.cross_entropy(b['pred'].detach(), b['yb'][0]))
    with pytest.raises(ValueError, match='fold=True'): mk_learn(class_dls(), cbs=MixUp(1., fold=False, partners=SecondLoader(second(labels=False)))).fit(1)

def test_masks_need_masks():
    x,y = torch.rand(16, 3, 8, 8), torch.zeros(16, 8, 8).long()
    dls,dl = mk_dls([x], [y]), DataLoader([(o,) for o in x], bs=8, num_workers=0)
    learn = mk_learn(dls, nn.Conv2d(3, 2, 1), cbs=CutMix(fold=True, partners=SecondLoader(dl)))
    with pytest.raises(ValueError, match='mask can not be cut'): learn.fit(1)

@pytest.mark.parametrize('dl,what', [(second(0), 'no batch'), (second(3, 5, drop_last=True), 'no batch'), (second(n_in=7), 'shape .n, 6.'),
    ([(torch.rand(5, 6).double(), torch.zeros(5).long())], 'float64'), ([(torch.rand(5, 6), torch.zeros(5).long(), torch.zeros(5))], '3 tensors'),
    ([(torch.rand(5, 6), torch.zeros(5))], 'int64.*float32'), ([(torch.rand(5, 6), ['a']*5)], 'list')])
def test_a_second_loader_that_does_not_fit(dl, what):
    learn = mk_learn(class_dls(), cbs=MixUp(.4, partners=SecondLoader(dl)))
    own = learn.loss_func
    with pytest.raises(ValueError, match=what): learn.fit(1)
    learn.remove_cb(MixUp)
    assert learn.loss_func is own

def test_lock_step_is_noticed_and_avoided():
    "Else each of the two loaders' batches would hold the same samples"
    def loaders():
        set_seed(5)
        a = class_dls()
        return a, class_dls().train
    a,b = loaders()
    assert all(o[0].equal(p[0]) for o,p in zip(a.train, b))
    a,b = loaders()
    with pytest.warns(UserWarning, match='lock step'): mk_learn(a, cbs=[MixUp(1., partners=SecondLoader(b)), record := Record()]).fit(1)
    shared = [len({tuple(o) for o in r['xb'][0].tolist()} & {tuple(o) for o in p[0].tolist()}) for r,p in zip(record.batches, b)]
    assert sum(shared)<20
    g = [torch.Generator().manual_seed(3) for _ in range(2)]
    one,two = (TorchLoader(list(range(8)), shuffle=True, generator=o) for o in g)
    with pytest.warns(UserWarning, match='lock step'): SecondLoader(two).begin(one, rng)
    assert not g[0].get_state().equal(g[1].get_state())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        SecondLoader(two).begin(one, rng)
        SecondLoader([1]).begin(one, rng)

def test_the_same_loader_twice():
    dls = class_dls()
    with pytest.raises(ValueError, match='dls.train.new'): mk_learn(dls, cbs=MixUp(partners=SecondLoader(dls.train))).fit(1)
    mk_learn(dls, cbs=MixUp(partners=SecondLoader(DataLoader(dls.train_ds, bs=8, num_workers=0)))).fit(1)

def test_pickled_without_data():
    mixer = pickle.loads(pickle.dumps(MixUp(.4, partners=SecondLoader(second()))))
    with pytest.raises(ValueError, match='without its data'): mk_learn(class_dls(), cbs=mixer).fit(1)

def test_positions_after_the_batch():
    for bs,more in ((8,3), (3,8), (5,5)):
        idx = draw_partners(bs, rng, more)
        counts = torch.bincount(idx-bs, minlength=more)
        assert idx.min()>=bs and counts.max()-counts.min()<=1 and len(idx)==bs
