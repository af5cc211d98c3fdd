"The plain loop: batches of any shape, `MixCollate` in workers, and errors that say what is there"
from collections import OrderedDict, UserDict, namedtuple
from copy import deepcopy
import pytest, torch, torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate
from fastmix.callback import MixUp
from fastmix.core import Plan
from fastmix.loss import MixLoss
from fastmix.mixes import Blend, Choice, Cut, Sometimes
from fastmix.pytorch import BatchKeys, MixCollate

Pair = namedtuple('Pair', 'img label')

def samples(n=96, side=4):
    "Pictures that tell which sample they are: 1 in channel 0 at their number"
    x = torch.zeros(n, 1, n, side)
    x[range(n),0,range(n)] = 1.
    return [(x[i],i) for i in range(n)]

def as_dict(s): return [dict(img=x, label=y) for x,y in s]
def deep(s): return [dict(views=Pair(x, 0), meta=dict(y=[y,'name'])) for x,y in s]

@pytest.mark.parametrize('num_workers', [0,2])
@pytest.mark.parametrize('shape', [list,as_dict,deep], ids=lambda f: f.__name__)
def test_each_sample_is_mixed_with_its_partner(shape, num_workers):
    "As read off the pictures, in the workers of a loader"
    keys = dict(x=('views',0), y=('meta','y',0)) if shape is deep else {}
    dl = DataLoader(shape(samples()), batch_size=16, shuffle=True, num_workers=num_workers, collate_fn=MixCollate(Blend(1.), **keys))
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

def test_large_pictures_survive_the_way_from_a_worker():
    "Memory that is used again in the worker is not what the loop was given"
    ds = [(torch.full((3,128,128), float(i)), i) for i in range(24)]
    dl = DataLoader(ds, batch_size=4, num_workers=1, collate_fn=MixCollate(Blend(1.)))
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
    model,loss,mix = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)),MixLoss(nn.CrossEntropyLoss(label_smoothing=.1)),Blend(1.)
    ref = deepcopy(model)
    opts = [torch.optim.Adam(o.parameters(), lr=.01) for o in (model,ref)]
    collate = MixCollate(mix) if way=='collate' else default_collate
    first = last = None
    for idx in DataLoader(range(256), batch_size=32, shuffle=True, collate_fn=list):
        x,y = default_collate([ds[i] for i in idx])
        if way=='collate': (mixed,_),plan = collate([ds[i] for i in idx])
        else:
            plan = mix.draw(x)
            mixed = plan.mix(x)
        def ce(i, j, lam): return F.cross_entropy(ref(lam*x[i:i+1] + (1-lam)*x[plan.idx[i],None]), y[j:j+1], label_smoothing=.1)
        values = [lam*ce(i, i, lam) + (1-lam)*ce(i, j, lam) for i,(lam,j) in enumerate(zip(plan.lam, plan.idx))]
        both = loss(model(mixed), y, plan=plan),torch.stack(values).mean()
        assert both[0].item()==pytest.approx(both[1].item(), abs=1e-5)
        for value,opt in zip(both, opts):
            value.backward()
            opt.step()
            opt.zero_grad()
        first,last = first or value.item(),value.item()
    assert last<first
    for p,q in zip(model.parameters(), ref.parameters()): assert torch.allclose(p, q, atol=1e-4)

def lams(**kwargs):
    collate = MixCollate(Choice([Blend(1.),Cut()], per_batch=False))
    return [plan.lam for _,plan in DataLoader(samples(), batch_size=16, collate_fn=collate, **kwargs)]

@pytest.mark.parametrize('kwargs', [{}, dict(num_workers=2)], ids=str)
def test_the_same_after_the_same_seed(kwargs):
    def run():
        torch.manual_seed(5)
        return lams(**kwargs)
    assert all(map(torch.equal, run(), run()))

def test_workers_and_epochs_differ():
    dl = DataLoader(samples(), batch_size=16, num_workers=3, collate_fn=MixCollate(Blend(1.)))
    drawn = torch.stack([plan.lam for _ in range(3) for _,plan in dl])
    assert len(drawn.unique(dim=0))==len(drawn)==18

def test_persistent_workers_go_on():
    dl = DataLoader(samples(), batch_size=16, num_workers=2, persistent_workers=True, collate_fn=MixCollate(Blend(1.)))
    drawn = torch.stack([plan.lam for _ in range(3) for _,plan in dl])
    assert len(drawn.unique(dim=0))==len(drawn)==18

def test_global_streams_are_left_alone():
    torch.manual_seed(0)
    collate,before = MixCollate(Blend(1.)),torch.get_rng_state()
    collate(samples(8))
    assert torch.get_rng_state().equal(before)

@pytest.mark.parametrize('cls', [dict,OrderedDict,UserDict])
def test_a_replaced_batch_keeps_its_class(cls):
    batch = cls(img=torch.rand(2), label=torch.zeros(2), path=['a','b'])
    new = BatchKeys().replace(batch, (torch.ones(2),), (batch['label'],))
    assert type(new) is cls and new['img'].equal(torch.ones(2)) and not batch['img'].equal(new['img']) and list(new)==list(batch)
    assert new['path'] is batch['path']

def test_several_inputs_and_targets():
    a,b,y,z = torch.rand(4, 2),torch.rand(4, 3),torch.arange(4),torch.rand(4)
    assert BatchKeys().take((a,b,y)) == ((a,b),(y,))
    assert BatchKeys(x=[0,1], y=[2,3]).take((a,b,y,z)) == ((a,b),(y,z))

@pytest.mark.parametrize(('keys','batch','match'), [
    ({}, dict(image=1, label=2), "nothing at 'img', since 'img' is not in a dict with the keys 'image', 'label'"),
    (dict(y='cls'), dict(img=1, label=2), "nothing at 'cls'"),
    (dict(x=('a','b')), dict(a=[1,2], label=2), "'b' is not in a list of 2"),
    (dict(x=2), (1,2), 'nothing at 2'),
    (dict(x='img'), (1,2), "it is a tuple of 2, with x='img' and y=None"),
    (dict(x=('img',0)), dict(img=torch.rand(3), label=2), '0 is not in a Tensor'),
    ({}, torch.rand(3), 'must hold inputs and targets, but it is a Tensor'),
    ({}, [torch.rand(3)], 'must hold inputs and targets, but it is a list of 1'),
], ids=str)
def test_what_is_not_there(keys, batch, match):
    with pytest.raises(ValueError, match=match): BatchKeys(**keys).take(batch)

left = [({},(0,1),(2,)), (dict(y=0),(1,2),(0,)), (dict(x=[0,1]),(0,1),(2,)), (dict(x=1, y=[0,2]),(1,),(0,2)), (dict(y=-1),(0,1),(2,))]
@pytest.mark.parametrize(('keys','x','y'), left)
def test_what_is_not_named_is_what_is_left(keys, x, y):
    batch = torch.rand(3, 4).unbind()
    assert [[any(o is batch[i] for i in want) for o in got] for got,want in zip(BatchKeys(**keys).take(batch), (x,y))]==[[True]*len(x),[True]*len(y)]

@pytest.mark.parametrize('keys', [dict(x=0), dict(x=0, y=0), dict(x=[0,1,2]), dict(y=[0,1,2])], ids=str)
def test_nothing_is_input_and_target(keys):
    with pytest.raises(ValueError, match='as input and as target|must hold inputs and targets'): BatchKeys(**keys).take(torch.rand(3, 4).unbind())

def test_schedules_are_refused():
    for mix in Sometimes(Blend(), until=.5),Blend(lambda p: .1+p):
        with pytest.raises(ValueError, match='can not follow a schedule here'): MixCollate(mix)

def test_what_can_not_be_mixed():
    with pytest.raises(TypeError, match='can not be averaged'): MixCollate(Blend())([(torch.arange(3),0)]*4)
    with pytest.raises(TypeError, match='Only tensors can be mixed'): MixCollate(Blend())([(torch.rand(3),'name')]*4)
    with pytest.raises(TypeError, match=r'mix must be a mix such as Blend\(.4\), but it is a MixUp'): MixCollate(MixUp())

def test_off():
    (x,y),plan = MixCollate(Blend(0))(samples(8))
    assert x.equal(default_collate(samples(8))[0]) and type(plan) is Plan

@pytest.mark.parametrize('dtype', [torch.uint8, torch.int64], ids=str)
def test_classes_that_are_taken_for_an_input(dtype):
    "Behind them in the batch are weights, which are taken for the target"
    ds = TensorDataset(torch.rand(8, 1, 4, 4), torch.arange(8).to(dtype), torch.rand(8))
    with pytest.raises(TypeError, match='can not be averaged'): next(iter(DataLoader(ds, 8, collate_fn=MixCollate(Blend(1.)))))
