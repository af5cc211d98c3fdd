"Who meets whom: functions of the targets, the user's own, and a second loader"
import pickle, random, warnings
from functools import partial
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.data.transforms import ColReader, RandomSplitter
from fastai.metrics import accuracy
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders
from fastai.text.data import TextDataLoaders
from fastai.torch_core import set_seed
from torch import nn, tensor
from torch.testing import assert_close
from torch.utils.data import DataLoader as TorchLoader
from fastmix.check import check_mix
from fastmix.losses import MixLoss
from fastmix.metrics import MixMetric
from fastmix.mixers import CutMix, MixUp, OneOf, ResizeMix
from fastmix.partners import SecondLoader, balanced, class_weights, derange, near_target, other_class, same_class
from helpers import class_dls, mk_dls, mk_learn, name_of, quiet_fit, Record

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

def test_classes_may_have_a_column(): assert (often(same_class, y[:,None], 400)-often(same_class, y, 400)).abs().max() < .15

def test_a_derangement_uses_each_sample_once():
    for n in range(2, 9):
        idx = derange((torch.zeros(n),), (), rng)
        assert idx.sort().values.equal(torch.arange(n)) and (idx!=torch.arange(n)).all()
    assert derange((torch.zeros(1),), (), rng).tolist()==[0]

def test_balanced_draws_classes_evenly():
    want = torch.tensor([1/4/(y==c).sum().item() for c in y], dtype=torch.float64).expand(10, 10)
    assert (often(balanced, y)-want).abs().max() < .04

@pytest.mark.parametrize('bandwidth,shape', [(.1,(7,)), (.5,(7,1)), (3.,(7,2))], ids=name_of)
def test_near_targets_are_likelier(bandwidth, shape):
    t = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    z = t.double().reshape(7, -1).numpy()
    sd2 = z.var(0).sum()
    w = np.array([[0 if i==j else np.exp(-((z[i]-z[j])**2).sum()/(2*bandwidth**2*sd2)) for j in range(7)] for i in range(7)])
    assert np.abs(often(partial(near_target, bandwidth=bandwidth), t).numpy() - w/w.sum(1, keepdims=True)).max() < .04

def test_near_targets_far_away():
    "The nearest is chosen, however far; equal targets are chosen equally often"
    far = tensor([0.,1e6,3e6,3e6+1])
    assert (often(partial(near_target, bandwidth=1e-4), far, 50).argmax(1)==tensor([1,0,3,2])).all()
    assert (often(near_target, torch.ones(4))-even(~torch.eye(4).bool())).abs().max() < .04
    assert near_target((), (torch.ones(1),), rng).tolist()==[0]

@pytest.mark.parametrize('f,bad', [(same_class, torch.rand(4)), (other_class, torch.zeros(4,2).long()), (balanced, torch.rand(4,2)),
    (near_target, torch.arange(4))])
def test_targets_of_the_wrong_kind(f, bad):
    for yb in (bad,),(): pytest.raises(ValueError, f, (x[:4],), yb, rng).match(f.__name__)

@pytest.mark.parametrize('bandwidth', [0, -1., '1', None])
def test_bad_bandwidth(bandwidth):
    with pytest.raises(ValueError, match=f'bandwidth must be above 0, but it is {bandwidth!r}'):
        near_target((), (torch.rand(4),), rng, bandwidth)

@pytest.mark.parametrize('f,kinds', [(derange, ('masks','maps')), (same_class, ('classes',)), (other_class, ('classes',)),
    (balanced, ('classes',)), (near_target, ('labels','numbers'))])
@pytest.mark.parametrize('mixer', [partial(MixUp, k=3), partial(CutMix, per_batch=True)])
def test_mixers_teach_what_they_show(f, kinds, mixer):
    for kind in kinds: assert check_mix(mixer(partners=f), kind, n_batches=3) < 1e-6

def test_in_a_learner():
    "Partners differ between batches, and repeat after the same seed"
    learn = mk_learn(class_dls(), cbs=[MixUp(1., partners=other_class), record := Record()])
    runs = []
    for _ in range(2):
        learn.dls = class_dls()
        set_seed(0)
        quiet_fit(learn, 2)
        runs.append([b['plan'].idx for b in record.batches])
        for b in record.batches: assert (b['yb'][0][b['plan'].idx] != b['yb'][0]).all()
    assert all(map(torch.equal, *runs)) and any(not i.equal(j) for i,j in zip(runs[0], runs[0][1:]))

@pytest.mark.parametrize('answer', [torch.arange(1, 9), -torch.arange(8), torch.zeros(7).long(), torch.zeros(8), torch.zeros(8, 1).long(),
    torch.zeros(8)>1, None, 'abc'], ids=name_of)
def test_a_wrong_answer_is_named(answer):
    learn = mk_learn(class_dls(), cbs=MixUp(.4, partners=lambda xb,yb,rng: answer))
    own = learn.loss_func
    with pytest.raises(ValueError, match='partners must return a position for each of the 8 samples'): quiet_fit(learn)
    learn.remove_cb(MixUp)
    assert learn.loss_func is own

# A second loader

def second(n=12, bs=5, shift=100., labels=True, n_in=6, **kwargs):
    g = torch.Generator().manual_seed(9)
    xs,ys = torch.randn(n, n_in, generator=g)+shift, torch.randint(0, 4, (n,), generator=g)
    return DataLoader(list(zip(xs, ys)) if labels else [(o,) for o in xs], bs=bs, num_workers=0, **kwargs)

@pytest.mark.parametrize('n,bs,k', [(12,5,3), (40,16,2), (1,1,2)])
def test_partners_come_from_the_second_loader(n, bs, k):
    "Shorter or longer than the first, with batches of any size: each mixture is λ of its own and 1-λ of the others'"
    learn = mk_learn(class_dls(), cbs=[MixUp(1., k=k, partners=SecondLoader(second(n, bs))), record := Record()])
    quiet_fit(learn, 2)
    for b in record.batches:
        plan,own = b['plan'],b['plan'].weights[:,:1]
        theirs = (b['mixed'][0] - own*b['xb'][0])/(1-own).clamp_min(1e-3)
        assert len(b['mixed'][0])==8 and ((theirs>90) | (own>.99)).all()
        assert plan.n in {8+bs, 8+(n%bs or bs)} and (plan.pairs[:,1:]>=8).all()

def test_the_loss_and_the_batch_are_the_second_loaders():
    def soft(y): return F.one_hot(y, 4).float()
    dl = second(10, 5)
    (x2,y2),(x1,y1) = next(iter(dl)), (torch.randn(8, 6), torch.randint(0, 4, (8,)))
    (xp,),(yp,) = SecondLoader(dl).append_partners((x1,), (y1,))
    assert xp.equal(torch.cat([x1,x2])) and yp.equal(torch.cat([y1,y2]))
    plan,pred = MixUp(1.).draw(xp, bs=8),torch.randn(8, 4)
    lam,j = plan.lam[:,None],plan.idx-8
    assert_close(plan.mix(xp), lam*x1 + (1-lam)*x2[j])
    want = -((lam*soft(y1) + (1-lam)*soft(y2[j]))*pred.log_softmax(1)).sum(1).mean()
    assert_close(MixLoss(nn.CrossEntropyLoss())(pred, yp, plan=plan), want)
    assert_close(MixLoss(nn.MSELoss())(pred, soft(yp), plan=plan), (pred-lam*soft(y1)-(1-lam)*soft(y2[j])).square().mean())

@pytest.mark.parametrize('kind', ['classes','numbers','masks'])
@pytest.mark.parametrize('mixer', [ResizeMix, lambda **kw: OneOf(MixUp(.4, k=3), CutMix(), **kw)])
def test_mixers_teach_what_they_show_of_a_second_loader(mixer, kind):
    v = (torch.rand(30, generator=torch.Generator().manual_seed(3))<.5).float()
    images = v.view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    items = list(zip(images, dict(classes=v.long(), numbers=v[:,None], masks=images[:,0].long())[kind]))
    assert check_mix(mixer(partners=SecondLoader(DataLoader(items, bs=7, shuffle=True, num_workers=0))), kind, n_batches=6) < 1e-6

@pytest.mark.parametrize('mixer', [partial(MixUp, k=3), partial(MixUp, p=.5),
    lambda alpha, **kw: OneOf(MixUp(alpha), None, per_batch=False, **kw)])
def test_without_targets_padded_texts_keep_their_own(mixer):
    "Also where mixtures are sorted by length"
    g = torch.Generator().manual_seed(0)
    x,partners = torch.randint(1, 33, (32,5), generator=g),[(torch.randint(1, 33, (8,5), generator=g),)]
    x[:,0] = torch.arange(1, 33)   # all different
    for o,n in zip(x, torch.randint(1, 6, (32,), generator=g)): o[n:] = 0
    model = nn.Sequential(nn.Embedding(33, 4, padding_idx=0), nn.Flatten(), nn.Linear(20, 32))
    learn = mk_learn(mk_dls([x], [torch.arange(32)]), model, cbs=[mixer(1e-6, partners=SecondLoader(partners)), record := Record()])
    quiet_fit(learn, lr=0.)
    places = []
    for b in record.batches:   # with so small an α each mixture is one of the batch
        same = (model(b['xb'][0])[None]-b['pred'][:,None]).abs().sum(-1) < 1e-4
        assert same.any(1).all()
        places += same.int().argmax(1)
        assert_close(b['loss'], F.cross_entropy(b['pred'].detach(), b['yb'][0][same.int().argmax(1)]))
    assert places!=[*range(8)]*4   # some were moved

def test_without_targets_a_sample_keeps_its_own():
    learn = mk_learn(class_dls(), cbs=[MixUp(1., partners=SecondLoader(second(labels=False))), record := Record()])
    for b in quiet_fit(learn).record.batches: assert_close(b['loss'], F.cross_entropy(b['pred'].detach(), b['yb'][0]))
    unfolded = MixUp(1., fold=False, partners=SecondLoader(second(labels=False)))
    with pytest.raises(ValueError, match='fold=True'): quiet_fit(mk_learn(class_dls(), cbs=unfolded))

def test_masks_need_masks():
    x,y = torch.rand(16, 3, 8, 8), torch.zeros(16, 8, 8).long()
    dls,dl = mk_dls([x], [y]), DataLoader([(o,) for o in x], bs=8, num_workers=0)
    learn = mk_learn(dls, nn.Conv2d(3, 2, 1), cbs=CutMix(fold=True, partners=SecondLoader(dl)))
    with pytest.raises(ValueError, match='mask cannot be cut'): quiet_fit(learn)

@pytest.mark.parametrize('dl,what', [(second(0), 'no batch'), (second(3, 5, drop_last=True), 'no batch'), (second(n_in=7), 'shape .n, 6.'),
    ([(torch.rand(5, 6).double(), torch.zeros(5).long())], 'float64'),
    ([(torch.rand(5, 6), torch.zeros(5).long(), torch.zeros(5))], '3 tensors'),
    ([(torch.rand(5, 6), torch.zeros(5))], 'int64.*float32'), ([(torch.rand(5, 6), ['a']*5)], 'list')])
def test_a_second_loader_that_does_not_fit(dl, what):
    learn = mk_learn(class_dls(), cbs=MixUp(.4, partners=SecondLoader(dl)))
    own = learn.loss_func
    with pytest.raises(ValueError, match=what): quiet_fit(learn)
    learn.remove_cb(MixUp)
    assert learn.loss_func is own

def test_lock_step_is_noticed_and_avoided():
    "Otherwise the batches of both loaders would hold the same samples"
    def loaders():
        set_seed(5)
        a = class_dls()
        return a, class_dls().train
    a,b = loaders()
    assert all(o[0].equal(p[0]) for o,p in zip(a.train, b))
    a,b = loaders()
    with pytest.warns(UserWarning, match='lock step'): quiet_fit(mk_learn(a, cbs=[MixUp(1., partners=SecondLoader(b)), record := Record()]))
    def rows(x): return {tuple(o) for o in x.tolist()}
    assert sum(len(rows(r['xb'][0]) & rows(p[0])) for r,p in zip(record.batches, b))<20
    g = [torch.Generator().manual_seed(3) for _ in range(2)]
    one,two = (TorchLoader(list(range(8)), shuffle=True, generator=o) for o in g)
    with pytest.warns(UserWarning, match='lock step'): SecondLoader(two).begin_fit(one, rng)
    assert not g[0].get_state().equal(g[1].get_state())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for dl in two,[1]: SecondLoader(dl).begin_fit(one, rng)

def test_the_same_loader_twice():
    dls = class_dls()
    with pytest.raises(ValueError, match='dls.train.new'): quiet_fit(mk_learn(dls, cbs=MixUp(partners=SecondLoader(dls.train))))
    quiet_fit(mk_learn(dls, cbs=MixUp(partners=SecondLoader(DataLoader(dls.train_ds, bs=8, num_workers=0)))))

def test_pickled_without_data():
    mixer = pickle.loads(pickle.dumps(MixUp(.4, partners=SecondLoader(second()))))
    with pytest.raises(ValueError, match='without its data'): quiet_fit(mk_learn(class_dls(), cbs=mixer))

# Second loaders in one call

def number(row): return torch.tensor([row['x']]).float()
def table(labels): return pd.DataFrame(dict(x=np.arange(float(len(labels))), label=labels))
def loaders(df, **kwargs):
    block = DataBlock((TransformBlock, CategoryBlock(**kwargs)), get_x=number, get_y=ColReader('label'), splitter=RandomSplitter(seed=1))
    return block,block.dataloaders(df, bs=8, num_workers=0, device='cpu')

uneven = table(['rare' if i%10==0 else 'usual' for i in range(200)])
def usual(loader, n=3): return torch.cat([b[-1] for _ in range(n) for b in loader.dl]).float().mean().item()

def test_balanced_loader_of_loaders_and_of_a_block():
    block,dls = loaders(uneven)
    assert usual(SecondLoader.from_dls(dls))==pytest.approx(.9, abs=.03)==usual(SecondLoader.from_dblock(block, uneven))
    for loader in SecondLoader.from_dls(dls, balanced=True), SecondLoader.from_dblock(block, uneven, balanced=True, bs=16, num_workers=0):
        assert usual(loader)==pytest.approx(.5, abs=.08)
    assert SecondLoader.from_dls(dls, bs=5).dl.bs==5
    weights,is_rare = class_weights(dls),np.array([o%10==0 for o in dls.train_ds.items.index])
    assert weights[is_rare].sum()==pytest.approx(.5)==weights[~is_rare].sum()

def test_a_balanced_loader_trains():
    _,dls = loaders(uneven)
    cbs = [MixUp(1., partners=SecondLoader.from_dls(dls, balanced=True)), record := Record()]
    quiet_fit(mk_learn(dls, nn.Linear(1, 2), metrics=MixMetric(accuracy), cbs=cbs), 2)
    assert all((b['plan'].idx>=8).all() for b in record.batches)

def test_drawing_evenly_leaves_global_streams_alone():
    loader = SecondLoader.from_dls(loaders(uneven)[1], balanced=True)
    def state(): return random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state().tolist()
    before,a = state(),loader.dl.get_idxs()
    assert a!=loader.dl.get_idxs() and state()==before

def test_balanced_tables_texts_and_plain_tensors():
    t = uneven.assign(kind=['p','q']*100, text=[f'word {i}' for i in range(200)])
    tables = TabularDataLoaders.from_df(t, procs=[Categorify,Normalize], cat_names=['kind'], cont_names=['x'], y_names='label', bs=8)
    texts = TextDataLoaders.from_df(t, text_col='text', label_col='label', bs=8)
    for dls in tables,texts: assert usual(SecondLoader.from_dls(dls, balanced=True))==pytest.approx(.5, abs=.1)
    assert len(SecondLoader.from_dls(class_dls(), balanced=True).next())==2

def test_numbers_cannot_be_balanced():
    items = list(zip(torch.randn(16, 6), torch.rand(16, 1)))
    with pytest.raises(ValueError, match='one class for each item, but the targets are float'):
        SecondLoader.from_dls(DataLoaders.from_dsets(items, items, bs=4, num_workers=0), balanced=True)

def test_a_second_loader_that_numbers_its_classes_differently_is_refused():
    all_,few = table(['cat','dog','owl']*20),table(['dog','owl']*20)
    dls = loaders(all_)[1]
    def learner(second): return mk_learn(dls, nn.Linear(1, 3), cbs=MixUp(.4, partners=SecondLoader.from_dls(second)))
    with pytest.raises(ValueError, match='numbers its classes as.*same DataBlock'): quiet_fit(learner(loaders(few)[1]))
    quiet_fit(learner(loaders(few, vocab=['cat','dog','owl'])[1]))

def test_texts_without_labels_as_partners():
    "They number their tokens as the first loader does, and have no classes"
    t = pd.DataFrame(dict(text=['a b c d','d c b a','b b a a','c d c d']*10, label=['x','y']*20))
    dls = TextDataLoaders.from_df(t, text_col='text', label_col='label', valid_pct=.2, seed=1, bs=8, seq_len=20)
    second = SecondLoader(dls.test_dl(t.iloc[:16], bs=8))
    second.begin_fit(dls.train, rng)
    assert len(second.next())==1
