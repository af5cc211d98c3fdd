"Losses of your own: each call is as the first, and one that does not look at its targets is refused"
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
import pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.callback.core import Callback
from fastai.losses import BaseLoss
from fastmix.losses import MixLoss
from fastmix.mixers import MixUp
from fastmix.plan import Plan
from helpers import class_dls, mk_dls, mk_learn, quiet_fit, Record

pred,y = torch.randn(6, 4),torch.arange(6)%4
swap = Plan.of(torch.arange(6).roll(1), torch.tensor([.7]))
sides = Plan.of(torch.arange(6).roll(1), torch.linspace(.5, 1., 6))
def ce(p, y): return F.cross_entropy(p, y, reduction='none')

def mixed(u, plan=swap, p=pred):
    "The definition: `u` is the unreduced loss, as it is for predictions that nobody has touched"
    return (plan.lam*u(p.clone(), y) + (1-plan.lam)*u(p.clone(), y[plan.idx])).mean()

# Losses that write
def margin(p, y, reduction='mean'):
    p[torch.arange(len(y)),y] -= .35
    return F.cross_entropy(8*p, y, reduction=reduction)

def writes_targets(p, y):
    res = F.cross_entropy(p, y.remainder(4))
    y += 1
    return res

class Margin(nn.Module):
    reduction = 'mean'
    def forward(self, p, y): return margin(p, y, self.reduction)

@pytest.mark.parametrize('plan', [swap, sides], ids=['one λ','λ per sample'])
@pytest.mark.parametrize('f', [margin, partial(margin), Margin(), BaseLoss(Margin, flatten=False)], ids=['function','partial','module','fastai'])
def test_a_loss_that_writes_into_its_predictions(f, plan):
    p = pred.clone()
    torch.testing.assert_close(MixLoss(f)(p, y, plan=plan), mixed(lambda p,y: margin(p, y, 'none'), plan))
    assert p.equal(pred)
    grad = torch.autograd.grad(MixLoss(f)(p.requires_grad_()*1, y, plan=plan), p)[0]
    q = pred.clone().requires_grad_()
    want = torch.autograd.grad(mixed(lambda p,y: margin(p*1, y, 'none'), plan, q), q)[0]
    torch.testing.assert_close(grad, want)

def test_a_loss_that_writes_into_its_targets():
    targets = y.clone()
    torch.testing.assert_close(MixLoss(writes_targets)(pred, targets, plan=swap), mixed(ce))
    assert targets.equal(y)

# Losses with a memory
class Counts(nn.Module):
    "Its scale falls with each batch"
    def __init__(self):
        super().__init__()
        self.n = 0
    def forward(self, p, y, reduction='mean'):
        self.n += 1
        return F.cross_entropy(p, y, reduction=reduction)/self.n

class Buffers(Counts):
    def __init__(self):
        nn.Module.__init__(self)
        self.register_buffer('n', torch.zeros(()))

class Caches(nn.Module):
    "What it makes at its first call is there at the others"
    reduction = 'mean'
    def forward(self, p, y):
        if not hasattr(self, 'scale'): self.scale = 1/(1+y[0])
        return F.cross_entropy(p, y, reduction=self.reduction)*self.scale

def on_function(p, y):
    on_function.n += 1
    return F.cross_entropy(p, y)/on_function.n

def of_closure():
    n = 0
    def f(p, y):
        nonlocal n
        n += 1
        return F.cross_entropy(p, y)/n
    return f

class Method:
    n = 0
    def loss(self, p, y):
        self.n += 1
        return F.cross_entropy(p, y)/self.n

def function():
    on_function.n = 0
    return on_function

makes = [Counts, Buffers, function, of_closure, lambda: Method().loss, lambda: partial(of_closure()), lambda: BaseLoss(Counts, flatten=False)]

@pytest.mark.parametrize('make', makes,
    ids=['attribute','buffer','function','closure','method','partial','fastai'])
def test_a_memory_moves_on_once_a_batch(make):
    f = make()
    loss = MixLoss(f)
    for n in 1,2,3: torch.testing.assert_close(loss(pred, y, plan=swap), mixed(ce)/n)

def test_what_is_made_at_the_first_call_is_made_at_each():
    torch.testing.assert_close(MixLoss(Caches())(pred, y, plan=swap), .7*F.cross_entropy(pred, y) + .3*F.cross_entropy(pred, y[swap.idx])/(1+y[-1]))

def test_random_numbers_are_those_of_one_call():
    "And are drawn once"
    def drops(p, y, reduction='mean'): return F.cross_entropy(F.dropout(p), y, reduction=reduction)
    for plan in swap,sides:
        torch.manual_seed(1)
        got = MixLoss(drops)(pred, y, plan=plan),torch.rand(3)
        torch.manual_seed(1)
        want = mixed(ce, plan, F.dropout(pred)),torch.rand(3)
        torch.testing.assert_close(got, want)

def test_parameters_of_a_loss_get_the_gradient_of_all_targets():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.s = nn.Parameter(torch.ones(()))
        def forward(self, p, y): return F.cross_entropy(self.s*p, y)
    f = Scaled()
    MixLoss(f)(pred, y, plan=swap).backward()
    s = torch.ones((), requires_grad=True)
    mixed(lambda p,y: ce(s*p, y)).backward()
    torch.testing.assert_close(f.s.grad, s.grad)

# Losses that do not look at their targets
class Sees(nn.Module):
    "A model that is given the labels, and computes the loss"
    def __init__(self):
        super().__init__()
        self.lin,self.y = nn.Linear(6, 4),None
    def forward(self, x):
        p = self.lin(x)
        self.loss = F.cross_entropy(p, self.y) if self.training else p.sum()
        return p

class Tells(Callback):
    order = -5
    def before_batch(self): self.learn.model.y = self.learn.y

def told_learner(loss_func, **kwargs):
    model = Sees()
    return mk_learn(class_dls(), model, partial(loss_func, model), cbs=[MixUp(1., **kwargs), Tells()])

@pytest.mark.parametrize('loss_func', [lambda m,p,y: m.loss, lambda m,p,y: m.loss*1, lambda m,p,y: F.cross_entropy(p, m.y)],
    ids=['of the model','a new tensor','other labels'])
def test_a_loss_of_other_labels_than_its_targets(loss_func):
    learn = told_learner(loss_func)
    before = [o.clone() for o in learn.model.parameters()]
    with pytest.raises(ValueError, match='the same for both targets of a mixture.*y_int=False'): quiet_fit(learn)
    assert all(map(torch.equal, before, learn.model.parameters()))

def test_a_loss_of_no_labels():
    "Such as distillation: where the mixer is told that targets are not what counts"
    def to_teacher(p, y): return (p-1).square().mean()
    dls = class_dls()
    with pytest.raises(ValueError, match='y_int=False'): quiet_fit(mk_learn(dls, None, to_teacher, cbs=MixUp(1.)))
    for b in quiet_fit(mk_learn(dls, None, to_teacher, cbs=[MixUp(1., y_int=False), Record()])).record.batches:
        torch.testing.assert_close(b['loss'], (b['pred']-1).square().mean())

def test_the_same_value_by_chance():
    "All classes have the same loss where a last layer begins with zeros; targets may be the same; a hinge may be zero"
    model = nn.Linear(6, 4)
    for o in model.parameters(): nn.init.zeros_(o)
    def f(p, y): return F.cross_entropy(p, y)
    quiet_fit(mk_learn(class_dls(), model, f, cbs=MixUp(1.)))
    quiet_fit(mk_learn(mk_dls([torch.randn(16, 6)], [torch.zeros(16).long()]), None, f, cbs=MixUp(1.)))
    quiet_fit(mk_learn(class_dls(), None, lambda p,y: (p[:,0]*(y>9)).mean(), cbs=MixUp(1.)))

# What is trained
class Replaces(Callback):
    order,run_valid = 20,False
    def __init__(self, f, event='after_loss'): setattr(self, event, lambda: setattr(self.learn, 'loss_grad', f(self.learn)))

def test_a_loss_that_is_replaced_after_it_was_mixed():
    def plain(learn): return F.cross_entropy(learn.pred, learn.y)
    learn = mk_learn(class_dls(), cbs=[MixUp(1.), Replaces(plain)])
    own,before = learn.loss_func,learn.model.weight.clone()
    with pytest.raises(RuntimeError, match='another one is trained.*instead of replacing it'): quiet_fit(learn)
    assert learn.model.weight.equal(before) and learn.loss_func is own
    numbers = mk_dls([torch.randn(16, 6)], [torch.rand(16, 4)])   # the targets are blended, so that any loss of them is right
    quiet_fit(mk_learn(numbers, None, nn.MSELoss(), cbs=[MixUp(1.), Replaces(lambda learn: F.l1_loss(learn.pred, learn.y))]))

@pytest.mark.parametrize('f', [lambda o: o.loss_grad/4, lambda o: o.loss_grad + .1*o.pred.square().mean(), lambda o: o.loss_func(o.pred, *o.yb)], ids=['divided','added to','computed again'])
def test_a_loss_that_is_made_of_the_mixed_one(f): quiet_fit(mk_learn(class_dls(), cbs=[MixUp(1.), Replaces(f)]))

# Compiled and scripted
def plain(p:torch.Tensor, y:torch.Tensor) -> torch.Tensor: return F.cross_entropy(p, y)

@pytest.mark.filterwarnings('ignore:.*torch.jit')
@pytest.mark.parametrize('f,per_sample', [(torch.compile(nn.CrossEntropyLoss(), backend='eager'),True), (torch.compile(F.cross_entropy, backend='eager'),True),
    (torch.jit.script(nn.CrossEntropyLoss()),False), (torch.jit.script(plain),False)], ids=['module','function','scripted module','scripted function'])
def test_compiled_and_scripted_losses(f, per_sample):
    learn = mk_learn(class_dls(), None, f, cbs=[MixUp(1.), Record()])
    for b in quiet_fit(learn).record.batches:
        lam,y = b['plan'].lam,b['yb'][0]
        torch.testing.assert_close(b['loss'], (lam*ce(b['pred'], y) + (1-lam)*ce(b['pred'], y[b['plan'].idx])).mean())
        assert len(lam)==(8 if per_sample else 1)

@dataclass
class Output:
    logits: torch.Tensor

@pytest.mark.parametrize('cls', [Output, SimpleNamespace], ids=['data class','namespace'])
def test_a_loss_that_writes_into_predictions_of_any_class(cls):
    def f(o, y): return margin(o.logits, y)
    torch.testing.assert_close(MixLoss(f)(cls(logits=pred), y, plan=swap), mixed(lambda p,y: margin(p, y, 'none')))
