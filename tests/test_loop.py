"The plain loop: batches of any shape, `MixCollate` in workers, and errors that say what to write instead"
from collections import OrderedDict, UserDict, namedtuple
from copy import deepcopy
import pytest, torch, torch.nn.functional as F
from fastai.callback.mixup import MixUp as FastaiMixUp
from fastai.callback.schedule import SchedLin
from fastai.torch_core import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision.tv_tensors import BoundingBoxes
from fastmix.inputs import mix_lookups
from fastmix.loop import BatchKeys, MixCollate
from fastmix.losses import MixLoss
from fastmix.manifold import ManifoldMixUp
from fastmix.mixers import CutMix, MixUp, OneOf
from fastmix.partners import SecondLoader, other_class

Pair = namedtuple('Pair', 'img label')

def samples(n=96, side=4):
    "Images that show which sample they are: 1 in channel 0 at their number"
    x = torch.zeros(n, 1, n, side)
    x[range(n),0,range(n)] = 1.
    return [(x[i],i) for i in range(n)]

def as_dict(s): return [dict(img=x, label=y) for x,y in s]
def deep(s): return [dict(views=Pair(x, 0), meta=dict(y=[y,'name'])) for x,y in s]

@pytest.mark.parametrize(('shape','num_workers'), [(list,0),(as_dict,2),(deep,2)], ids=['tuple','dict','deep'])
def test_each_sample_is_mixed_with_its_partner(shape, num_workers):
    "As the images show"
    keys = dict(x=('views',0), y=('meta','y',0)) if shape is deep else {}
    dl = DataLoader(shape(samples()), batch_size=16, shuffle=True, num_workers=num_workers, collate_fn=MixCollate(MixUp(1.), **keys))
    seen = []
    for batch,plan in dl:
        (x,),(y,) = BatchKeys(**keys).take(batch)
        for row,i,j,lam in zip(x[:,0,:,0], y, y[plan.idx], plan.lam):
            want = torch.zeros(96)
            want[i] += lam
            want[j] += 1-lam
            assert torch.allclose(row, want, atol=1e-6)
        seen += y.tolist()
    assert sorted(seen)==list(range(96))

def test_large_images_survive_the_way_from_a_worker():
    "A worker may use memory again, but not that of the batches which the loop still holds"
    ds = [(torch.full((3,128,128), float(i)), i) for i in range(24)]
    dl = DataLoader(ds, batch_size=4, num_workers=1, collate_fn=MixCollate(MixUp(1.)))
    kept = list(dl)
    for (x,y),plan in kept:
        want = plan.lam*y + (1-plan.lam)*y[plan.idx]
        assert torch.allclose(x, want[:,None,None,None].expand_as(x), atol=1e-4)

@pytest.mark.parametrize('way', ['loop','collate'])
def test_a_training_on_the_digits(way):
    "Beside one whose loss and mixtures are written out sample by sample"
    x,y = load_digits(return_X_y=True)
    ds = TensorDataset(torch.tensor(x[:256]).float()/16, torch.tensor(y[:256]))
    torch.manual_seed(0)
    model,loss,mixer = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)),MixLoss(nn.CrossEntropyLoss(label_smoothing=.1)),MixUp(1.)
    ref,collate,losses = deepcopy(model),MixCollate(mixer),[]
    opts = [torch.optim.Adam(o.parameters(), lr=.01) for o in (model,ref)]
    for idx in DataLoader(range(256), batch_size=32, shuffle=True, collate_fn=list):
        x,y = default_collate([ds[i] for i in idx])
        if way=='collate': (mixed,_),plan = collate([ds[i] for i in idx])
        else:
            plan = mixer.draw(x)
            mixed = plan.mix(x)
        def ce(i, j, lam): return F.cross_entropy(ref(lam*x[i:i+1] + (1-lam)*x[plan.idx[i],None]), y[j:j+1], label_smoothing=.1)
        values = [lam*ce(i, i, lam) + (1-lam)*ce(i, j, lam) for i,(lam,j) in enumerate(zip(plan.lam, plan.idx))]
        both = loss(model(mixed), y, plan=plan),torch.stack(values).mean()
        losses.append([o.item() for o in both])
        for value,opt in zip(both, opts):
            value.backward()
            opt.step()
            opt.zero_grad()
    assert all(a==pytest.approx(b, abs=1e-5) for a,b in losses) and losses[-1][0]<losses[0][0]
    for p,q in zip(model.parameters(), ref.parameters()): assert torch.allclose(p, q, atol=1e-4)

def test_a_second_loader_in_a_loop():
    x,y = torch.rand(8, 5),torch.arange(8)%3
    second = DataLoader([(torch.full((5,), 7.),torch.tensor(3)) for _ in range(8)], batch_size=8)
    mixer,loss,model = MixUp(1., partners=SecondLoader(second)),MixLoss(nn.CrossEntropyLoss()),nn.Linear(5, 4)
    xb,yb = mixer.partners.append_partners((x,), (y,))
    plan = mixer.draw(xb, yb, bs=len(x))
    mixed,lam = plan.mix(*xb),plan.lam[:,None]
    assert torch.allclose(mixed, lam*x + (1-lam)*7)
    logp = model(mixed).log_softmax(1)
    want = -(plan.lam*logp[range(8),y] + (1-plan.lam)*logp[:,3]).mean()
    assert loss(model(mixed), *yb, plan=plan).item()==pytest.approx(want.item(), abs=1e-6)

def test_categories_in_a_loop():
    x,emb = torch.randint(0, 9, (8,3)),nn.Embedding(9, 4)
    plan = MixUp(1.).draw(x)
    want = torch.stack([lam*emb(a) + (1-lam)*emb(b) for lam,a,b in zip(plan.lam, x, x[plan.idx])])
    assert torch.allclose(emb(mix_lookups(plan, x)), want, atol=1e-6)

def test_partners_of_another_class_in_a_loader():
    for (_,y),plan in DataLoader([(x,i%3) for x,i in samples()], batch_size=16, collate_fn=MixCollate(MixUp(1., partners=other_class))):
        assert (y!=y[plan.idx]).all()

# Random generators
def draw_lams(n_epoch=1, **kwargs):
    collate = MixCollate(OneOf(MixUp(1.), CutMix(), per_batch=False))
    dl = DataLoader(samples(), batch_size=16, collate_fn=collate, **kwargs)
    return torch.stack([plan.lam for _ in range(n_epoch) for _,plan in dl])

@pytest.mark.parametrize('num_workers', [0,2])
def test_the_same_after_the_same_seed(num_workers):
    def run():
        set_seed(5)
        return draw_lams(num_workers=num_workers)
    assert run().equal(run())

@pytest.mark.parametrize('persistent_workers', [False,True])
def test_workers_and_epochs_differ(persistent_workers):
    drawn = draw_lams(3, num_workers=2, persistent_workers=persistent_workers)
    assert len(drawn.unique(dim=0))==len(drawn)==18

def test_global_streams_are_left_alone():
    torch.manual_seed(0)
    collate,before = MixCollate(MixUp(1.)),torch.get_rng_state()
    collate(samples(8))
    assert torch.get_rng_state().equal(before)

# Where inputs and targets are
@pytest.mark.parametrize('cls', [OrderedDict,UserDict])
def test_a_replaced_batch_keeps_its_class(cls):
    batch = cls(img=torch.rand(2), label=torch.zeros(2), path=['a','b'])
    new = BatchKeys().replace(batch, (torch.ones(2),), (batch['label'],))
    assert type(new) is cls and list(new)==list(batch) and new['path'] is batch['path']
    assert new['img'].equal(torch.ones(2)) and not batch['img'].equal(new['img'])

def test_other_tensors_of_a_dict_are_not_left_unmixed():
    batch = dict(img=torch.rand(2), size=torch.rand(2), label=torch.zeros(2))
    for keys in {}, dict(x='img'), dict(y='label'):
        with pytest.raises(ValueError, match="'size' of a dict.*pass the keys of all inputs and targets"): BatchKeys(**keys).take(batch)
    assert BatchKeys('img', 'label').take(batch)==((batch['img'],),(batch['label'],))

@pytest.mark.parametrize(('keys','x','y'), [({},(0,),(1,)), (dict(y=0),(1,),(0,)), (dict(x=1),(1,),(0,)), (dict(x=[0,1], y=2),(0,1),(2,)), (dict(x=1, y=[0,2]),(1,),(0,2))])
def test_what_is_not_named_is_what_is_left(keys, x, y):
    batch = torch.rand(len(x+y), 4).unbind()
    xb,yb = BatchKeys(**keys).take(batch)
    assert [*map(id, xb+yb)]==[id(batch[i]) for i in x+y] and len(xb)==len(x)

@pytest.mark.parametrize(('keys','batch','match'), [
    ({}, dict(image=1, label=2), "nothing at 'img', since 'img' is not in a dict with the keys 'image', 'label'"),
    (dict(x=('a','b')), dict(a=[1,2], label=2), "'b' is not in a list of 2"),
    (dict(x=('img',0)), dict(img=torch.rand(3), label=2), '0 is not in a Tensor'),
    (dict(x=2), (1,2), 'nothing at 2'),
    (dict(x='img'), (1,2), "it is a tuple of 2, with x='img' and y=None"),
    ({}, torch.rand(3), 'must hold inputs and targets, but it is a Tensor'),
    (dict(x=0), torch.rand(3, 4).unbind(), 'A batch of 3 may hold an index or weights.* as in x=0, y=1'),
    ({}, torch.rand(3, 4).unbind(), 'A batch of 3'),
    (dict(y=[0,1]), torch.rand(2, 4).unbind(), 'must hold inputs and targets'),
    (dict(x=0, y=0), torch.rand(3, 4).unbind(), 'as input and as target'),
], ids=range(10))
def test_what_is_not_there(keys, batch, match):
    with pytest.raises(ValueError, match=match): BatchKeys(**keys).take(batch)

# What a loader cannot mix
@pytest.mark.parametrize(('mixer','match'), [
    (MixUp(.4, until=.5), r'MixUp\(0.4, until=0.5\) follows a schedule.*mixer.draw\(x, pct='),
    (OneOf(MixUp(SchedLin(.1, 1.)), CutMix()), 'follows a schedule'),
    (MixUp(.4, soft=True), r'soft=True, which is for the loss: pass it there, MixLoss\(loss_func, soft=True\)'),
    (MixUp(.4, y_int=False), r'MixLoss\(loss_func, y_int=False\)'),
    (MixUp(.4, partners=SecondLoader([])), 'append_partners.*partners=balanced'),
    (ManifoldMixUp(.4), r'mixes behind hidden layers, which a loader does not have: use MixUp\(.4\)'),
], ids=range(6))
def test_what_belongs_in_the_loop(mixer, match):
    with pytest.raises(ValueError, match=match): MixCollate(mixer)

def test_what_is_no_mixer():
    for o in FastaiMixUp(),MixUp:
        with pytest.raises(TypeError, match=r'mixer must be one of fastmix, imported after fastai, as in MixCollate\(MixUp\(.4\)\)'): MixCollate(o)
    with pytest.raises(TypeError, match='the class MixUp: add parentheses'): MixCollate(MixUp)
    with pytest.raises(TypeError, match='collate_fn must be a function'): MixCollate(MixUp(), collate_fn=3)

@pytest.mark.parametrize(('sample','match'), [
    ((torch.arange(3),0), 'cannot be averaged: it holds categories .*, as in x=0, y=1'),
    ((torch.rand(3)>.5,0), 'cannot be averaged: it holds True and False'),
    ((torch.rand(3,8,8),BoundingBoxes(torch.rand(1,4), format='XYXY', canvas_size=(8,8))), 'Bounding boxes'),
    ((torch.rand(3),'name'), 'Only tensors can be mixed'),
], ids=range(4))
def test_batches_that_cannot_be_mixed(sample, match):
    with pytest.raises(TypeError, match=match): MixCollate(MixUp())([sample]*4)

def test_alpha_0():
    (x,y),plan = MixCollate(MixUp(0))(samples(8))
    assert x.equal(default_collate(samples(8))[0]) and (plan.lam==1).all()
