"Losses of your own: each call is as the first, and one that does not look at its targets is refused"
import itertools, random
from collections import Counter, deque
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.callback.core import Callback
from fastai.losses import BaseLoss
from fastmix.losses import MixLoss, MultiLoss
from fastmix.mixers import CutMix, MixUp
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
        if not hasattr(self, 'scale'): self.scale = 1/(1+F.cross_entropy(p, y).detach())
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

def of_list():
    n = [0]
    def f(p, y):
        n[0] += 1
        return F.cross_entropy(p, y)/n[0]
    return f

class Holds:
    def __init__(self, n): self.n = n
    def __call__(self, p, y):
        self.n[0] += 1
        return F.cross_entropy(p, y)/float(self.n[0])

class Nested(nn.Module):
    "Its memory is in a plain list of modules"
    def __init__(self):
        super().__init__()
        self.parts = [Counts()]
    def forward(self, p, y): return self.parts[0](p, y)

class Steps:
    def __init__(self): self.state = dict(step=0)
    def loss(self, p, y):
        self.state['step'] += 1
        return F.cross_entropy(p, y)/self.state['step']

def of_module():
    f = Counts()
    return lambda p,y: f(p, y)

def function():
    on_function.n = 0
    return on_function

makes = dict(attribute=Counts, buffer=Buffers, function=function, closure=of_closure, method=lambda: Method().loss, partial=lambda: partial(of_closure()),
    fastai=lambda: BaseLoss(Counts, flatten=False), list=of_list, counter=lambda: Holds(Counter({0:0})), array=lambda: Holds(np.zeros(1)),
    deque=lambda: Holds(deque([0])), module_of_a_lambda=of_module, list_of_modules=Nested, dictionary=lambda: Steps().loss)

@pytest.mark.parametrize('make', makes.values(), ids=makes)
def test_a_memory_moves_on_once_a_batch(make):
    f = make()
    loss = MixLoss(f)
    for n in 1,2,3: torch.testing.assert_close(loss(pred, y, plan=swap), mixed(ce)/n)

def test_what_is_made_at_the_first_call_is_made_at_each():
    def scaled(u): return u/(1+u)
    torch.testing.assert_close(MixLoss(Caches())(pred, y, plan=swap), .7*scaled(F.cross_entropy(pred, y)) + .3*scaled(F.cross_entropy(pred, y[swap.idx])))

def test_random_numbers_are_those_of_one_call():
    "They are drawn once"
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
    "A model that receives the labels, and computes the loss"
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
    with pytest.raises(ValueError, match='the same for both targets of a mixture.*y_int=False|same samples in another order'): quiet_fit(learn)
    assert all(map(torch.equal, before, learn.model.parameters()))

def test_a_loss_of_no_labels():
    "Such as distillation, where `y_int=False` says that targets do not matter"
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

# What a loss remembers, and where
class Prototypes(nn.Module):
    "Learns a centre of each class as it goes"
    reduction = 'mean'
    def __init__(self):
        super().__init__()
        self.register_buffer('c', torch.eye(4))
    def forward(self, p, y):
        u = (p-self.c[y]).square().sum(1)
        with torch.no_grad(): self.c.index_copy_(0, y, .9*self.c[y] + .1*p.detach())
        return u if self.reduction=='none' else u.mean()

class Normed(nn.Module):
    reduction = 'mean'
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
    def forward(self, p, y): return F.cross_entropy(self.bn(p), y, reduction=self.reduction)

class WritesData(nn.Module):
    def __init__(self):
        super().__init__()
        self.n,self.reduction = torch.zeros(()),'mean'
    def forward(self, p, y):
        self.n.data.add_(1)
        return F.cross_entropy(p, y, reduction=self.reduction)/self.n

@pytest.mark.parametrize('plan', [swap, sides], ids=['one λ','λ per sample'])
@pytest.mark.parametrize('cls', [Prototypes, Normed, WritesData])
def test_what_is_remembered_is_what_the_unmixed_batch_leaves(cls, plan):
    got,want = cls(),cls()
    p,t = pred[:4],y[:4]
    plan = Plan.of(torch.tensor([1,2,3,0]), plan.lam[:4])
    for _ in range(2):
        MixLoss(got)(3*p+1, t, plan=plan)
        want(3*p+1, t)
    def remembered(f): return [*f.buffers(), *(v for v in vars(f).values() if isinstance(v, torch.Tensor))]
    torch.testing.assert_close(remembered(got), remembered(want))

def test_a_tensor_that_others_hold_stays_the_same():
    bank = torch.zeros(4)
    class Bank(nn.Module):
        def __init__(self):
            super().__init__()
            self.bank = bank
        def forward(self, p, y):
            self.bank += 1
            return F.cross_entropy(p, y)*self.bank.sum()
    f = Bank()
    for n in 1,2: torch.testing.assert_close(MixLoss(f)(pred, y, plan=swap), 4*n*mixed(ce))
    assert f.bank is bank and bank.equal(torch.full((4,), 2.))

def of_generator():
    g = torch.Generator().manual_seed(0)
    return lambda p,y: F.cross_entropy(p*(torch.rand(p.shape, generator=g)>.5), y)

def of_iterator():
    n = itertools.count(1)
    return lambda p,y: F.cross_entropy(p, y)/next(n)

class Slots:
    __slots__ = 'n',
    def __init__(self): self.n = 0
    def __call__(self, p, y):
        self.n += 1
        return F.cross_entropy(p, y)/self.n

unseen = [of_generator, of_iterator, Slots]

@pytest.mark.parametrize('make', unseen, ids=['generator','iterator','slots'])
def test_a_memory_that_is_not_seen_is_refused(make):
    with pytest.raises(ValueError, match='for the same predictions and targets, so it cannot be called for both.*y_int=False'): MixLoss(make())(pred, y, plan=swap)

def test_parameters_that_a_loss_writes_into():
    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(4), requires_grad=False)
        def forward(self, p, y):
            self.w.mul_(.9)
            return F.cross_entropy(self.w*p, y)
    with pytest.raises(ValueError, match='writes into its parameters'): MixLoss(Teacher())(pred, y, plan=swap)

@pytest.mark.parametrize('rand', [lambda p: np.random.rand(*p.shape), lambda p: [[random.random() for _ in row] for row in p]], ids=['numpy','python'])
def test_random_numbers_of_other_generators(rand):
    def drops(p, y): return F.cross_entropy(p*(torch.as_tensor(rand(p))>.5), y)
    state = np.random.get_state(),random.getstate()
    got = MixLoss(drops)(pred, y, plan=swap)
    after = np.random.rand(),random.random()
    np.random.set_state(state[0])
    random.setstate(state[1])
    torch.testing.assert_close(got, mixed(ce, p=pred*(torch.as_tensor(rand(pred))>.5)))
    assert (np.random.rand(),random.random())==after

# Good losses that are not refused
def masked(p, y):
    known = y.isfinite()
    return (F.mse_loss(p[known], y[known]) if known.any() else p.sum()*0) + .1*p.square().mean()
def hinge(p, y): return (1-y*p).clamp_min(0).mean() + .1*p.square().mean()
def proportions(p, y): return (p.softmax(1).mean(0)-F.one_hot(y, 4).float().mean(0)).square().sum()

same = [(masked, torch.full((6,4), torch.nan)), (hinge, torch.ones(6, 4)), (hinge, torch.tensor([[2.],[3.]]).repeat(3, 4)), (proportions, y)]

@pytest.mark.parametrize('f,t', same,
    ids=['nothing known','no difference','all beyond the margin','permuted'])
def test_targets_that_happen_to_say_the_same(f, t):
    p = (pred.abs()+9).requires_grad_()
    torch.testing.assert_close(MixLoss(f)(p, t, plan=swap), .7*f(p, t) + .3*f(p, t[swap.idx]))

def test_targets_that_do_not_count_yet():
    "A weight that begins at 0 looks like a loss of other labels, and only the user knows better"
    def warm_up(p, y): return 0*F.cross_entropy(p, y) + p.square().mean()
    for loss in MixLoss(warm_up),MixLoss(warm_up, soft=True):
        with pytest.raises(ValueError, match='a warm-up from 0, y_int=True'): loss(pred, y, plan=swap)
    torch.testing.assert_close(MixLoss(warm_up, y_int=True)(pred, y, plan=swap), pred.square().mean())

def test_a_loss_that_takes_gradients():
    def penalised(p, y, reduction='mean'):
        u = F.cross_entropy(p, y, reduction='none')
        u = u + torch.autograd.grad(u.sum(), p, create_graph=True)[0].square().sum(1)
        return u if reduction=='none' else u.mean()
    p = pred.clone().requires_grad_()
    want = sum((w*penalised(p, t, 'none')).mean() for w,t in ((sides.lam,y),(1-sides.lam,y[sides.idx])))
    torch.testing.assert_close(MixLoss(penalised)(p, y, plan=sides), want)

def test_a_reduction_that_is_a_property():
    class Own(nn.Module):
        _reduction = 'mean'
        reduction = property(lambda self: self._reduction, lambda self,v: setattr(self, '_reduction', v))
        def forward(self, p, y): return F.cross_entropy(p, y, reduction=self.reduction)
    f = Own()
    torch.testing.assert_close(MixLoss(f)(pred, y, plan=sides), mixed(ce, sides))
    assert f.reduction=='mean'

def test_what_is_no_tensor():
    with pytest.raises(TypeError, match='must return a tensor to be mixed, but returned a dict'): MixLoss(lambda p,y: dict(loss=F.cross_entropy(p, y)))(pred, y, plan=swap)

class Centres(nn.Module):
    "Its centres are written in place, and then used"
    def __init__(self, how):
        super().__init__()
        self.register_buffer('c', torch.eye(4))
        self.how = how
    def forward(self, p, y):
        new = self.c.index_add(0, y, p.detach())
        if self.how=='data': self.c.data.copy_(new)
        elif self.how=='in place': self.c[:] = new
        else: self.c = new
        return F.cross_entropy(p@self.c, y)

@pytest.mark.parametrize('how', ['data','in place','new'])
def test_gradients_of_what_is_written_in_place(how):
    "Autograd keeps the tensors of each call"
    p,f = pred.clone().requires_grad_(),Centres(how)
    got = torch.autograd.grad(MixLoss(f)(p, y, plan=swap), p)[0]
    q = pred.clone().requires_grad_()
    want = torch.autograd.grad(.7*Centres('new')(q, y) + .3*Centres('new')(q, y[swap.idx]), q)[0]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(f.c, torch.eye(4).index_add(0, y, pred))

def test_what_is_attached_to_predictions():
    p = pred.clone().requires_grad_()*1
    p.aux = p.square().mean()
    def f(p, y): return F.cross_entropy(p, y) + p.aux
    torch.testing.assert_close(MixLoss(f)(p, y, plan=swap), mixed(ce) + p.aux)

def test_tensors_that_cannot_be_written():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('w', torch.ones(1).expand(4))
        def forward(self, p, y): return F.cross_entropy(p, y, weight=self.w)
    torch.testing.assert_close(MixLoss(Weighted())(pred, y, plan=swap), mixed(ce))

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
    def loss(self, p, y): return F.cross_entropy(self.bn(p), y)

@pytest.mark.parametrize('wrap', [lambda h: h.loss, lambda h: lambda p,y: h.loss(p, y), lambda h: partial(lambda p,y,h: h.loss(p, y), h=h)], ids=['method','closure','partial'])
def test_statistics_move_once_a_batch(wrap):
    head = Head()
    learn = mk_learn(class_dls(), None, wrap(head), cbs=MixUp(1.))
    quiet_fit(learn)
    assert head.bn.num_batches_tracked==8

class Stats(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.stats = make()
    def forward(self, p, y):
        n = next(iter(self.stats.values())) if isinstance(self.stats, dict) else self.stats[0]
        n.add_(1)
        return F.cross_entropy(p, y)/n.sum()

@pytest.mark.parametrize('make', [lambda: dict(n=torch.zeros(1)), lambda: [torch.zeros(1)], lambda: deque([torch.zeros(1)])], ids=['dict','list','deque'])
def test_tensors_in_containers(make):
    f = Stats(make)
    held = next(iter(f.stats.values())) if isinstance(f.stats, dict) else f.stats[0]
    for n in 1,2: torch.testing.assert_close(MixLoss(f)(pred, y, plan=swap), mixed(ce)/n)
    assert held==2 and (held is (f.stats['n'] if isinstance(f.stats, dict) else f.stats[0]))

def test_a_view_of_a_buffer_stays_one():
    class View(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('q', torch.zeros(4))
            self.head = self.q[1:3]
        def forward(self, p, y):
            self.head.add_(1)
            return F.cross_entropy(p, y)*self.q.sum()
    f = View()
    for n in 1,2: torch.testing.assert_close(MixLoss(f)(pred, y, plan=swap), 2*n*mixed(ce))
    assert f.q.tolist()==[0,2,2,0] and f.head.tolist()==[2,2] and f.head._base is f.q

def test_buffers_that_are_sparse():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('a', torch.eye(4).to_sparse())
        def forward(self, p, y): return F.cross_entropy((self.a@p.T).T, y)
    torch.testing.assert_close(MixLoss(Sparse())(pred, y, plan=swap), mixed(ce))

def test_a_class_that_is_not_in_every_batch():
    def rare(p, y): return F.binary_cross_entropy_with_logits(p[:,0], (y==3).float())
    t = torch.tensor([0,1,2,0,1,2])
    torch.testing.assert_close(MixLoss(rare)(pred.clone().requires_grad_(), t, plan=swap), rare(pred, t))

def test_hooks_and_records():
    seen,state = [],SimpleNamespace(n=0)
    def f(p, y):
        state.n += 1
        return F.cross_entropy(p, y)/state.n
    for n in 1,2: torch.testing.assert_close(MixLoss(f)(pred, y, plan=swap), mixed(ce)/n)
    hooked = Counts()
    hooked.register_forward_hook(lambda m,a,o: seen.append(o.item()))
    MixLoss(hooked)(pred, y, plan=swap)
    assert state.n==2 and len(seen)==1

class Stops(nn.Module):
    "Is interrupted, or fails, in its second call"
    def __init__(self, error):
        super().__init__()
        self.register_buffer('c', torch.zeros(4))
        self.error,self.log,self.n = error,[],0
    def forward(self, p, y, reduction='mean'):
        self.n += 1
        self.c += 1
        self.log.append(self.n)
        if self.error and not y.equal(globals()['y']): raise self.error
        return F.cross_entropy(p, y, reduction=reduction) if self.error else p.sum()*0 + 1

@pytest.mark.parametrize('plan', [swap, sides], ids=['one λ','λ per sample'])
@pytest.mark.parametrize('error', [KeyboardInterrupt(), RuntimeError('no memory'), None], ids=['interrupted','failed','refused'])
def test_a_loss_is_as_it_was_after_an_error(error, plan):
    "With the very tensors and lists that it had"
    f = Stops(error)
    c,log = f.c,f.log
    with pytest.raises((KeyboardInterrupt,RuntimeError,ValueError)): MixLoss(f)(pred.clone().requires_grad_(), y, plan=plan)
    assert f.c is c and f.log is log and not c.any() and not log and f.n==0

@pytest.mark.parametrize('error', [KeyboardInterrupt(), RuntimeError('no memory')], ids=['interrupted','failed'])
def test_a_loss_of_probabilities_is_as_it_was_after_an_error(error):
    f = Stops(error)
    c = f.c
    with pytest.raises((KeyboardInterrupt,ValueError)): MixLoss(f, soft=True)(pred, y, plan=swap)
    assert f.c is c and not c.any() and f.n==0

class Slotted:
    "Has no `__dict__`"
    __slots__ = ('gamma',)
    def __init__(self, gamma): self.gamma = gamma
    def loss(self, p, y, reduction='mean'): return F.cross_entropy(self.gamma*p, y, reduction=reduction)

def test_a_method_of_an_object_with_slots():
    want = .7*F.cross_entropy(2*pred, y) + .3*F.cross_entropy(2*pred, y.roll(1))
    torch.testing.assert_close(MixLoss(Slotted(2.).loss)(pred, y, plan=swap), want)

# What a loss knows of each sample, besides its targets
class Meter:
    "A plain object of one's own"
    def __init__(self): self.n = 0

class Histories(nn.Module):
    "Its state is nested deeply"
    def __init__(self):
        super().__init__()
        self.lists,self.array,self.meter = [deque() for _ in range(200)],np.empty(4, object),Meter()
        self.array[:] = [[] for _ in range(4)]
    def forward(self, p, y):
        u = ce(p, y)
        for c,v in zip(y.tolist(), u.tolist()): self.lists[190+c].append(v), self.array[c].append(v)
        self.meter.n += 1
        return u.mean()/self.meter.n

def test_a_memory_that_is_far_away():
    f = Histories()
    for n in 1,2: torch.testing.assert_close(MixLoss(f)(pred, y, plan=swap), mixed(ce)/n)
    assert sum(map(len, f.lists))==sum(map(len, f.array))==12 and f.meter.n==2
    assert f.lists[190][0]==f.array[0][0]==ce(pred, y)[0]

def test_a_memory_in_a_tuple_is_refused():
    class Statistics(nn.Module):
        def __init__(self):
            super().__init__()
            self.stats = torch.zeros(4),
        def forward(self, p, y):
            self.stats[0].index_add_(0, y, torch.ones(len(y)))
            return F.cross_entropy(p, y)
    with pytest.raises(ValueError, match='in a tuple'): MixLoss(Statistics())(pred, y, plan=swap)

class SampleWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.linspace(.5, 3, 6)
    def forward(self, p, y): return (ce(p, y)*self.w).mean()

weight = torch.linspace(.5, 3, 6)
def weighted(p, y, w=weight): return (ce(p, y)*w).mean()

@pytest.mark.parametrize('f', [SampleWeights(), partial(weighted, w=weight), weighted, lambda p,y: F.cross_entropy(p[:3], y[:3])], ids=['attribute','keyword','default','first half'])
def test_weights_of_samples_that_are_no_targets(f):
    with pytest.raises(ValueError, match='same samples in another order.*further target.*return it from the model'): MixLoss(f)(pred, y, plan=swap)

@pytest.mark.parametrize('f', [nn.BCEWithLogitsLoss(weight=weight[:,None]), partial(F.binary_cross_entropy_with_logits, weight=weight[:,None])], ids=['module','function'])
def test_weights_of_samples_in_a_loss_of_labels(f):
    with pytest.raises(ValueError, match=r'weight, of shape \(6, 1\)|same samples in another order'): MixLoss(f)(pred, F.one_hot(y).float(), plan=sides)
    MixLoss(nn.BCEWithLogitsLoss(weight=torch.ones(4)))(pred, F.one_hot(y).float(), plan=sides)   # of classes

def test_weights_of_samples_as_many_as_rows_of_a_mask():
    def f(p, y, w=None, reduction='mean'):
        u = F.cross_entropy(p, y, reduction='none')*w[:,None,None]
        return u.mean() if reduction=='mean' else u
    with pytest.raises(ValueError, match='same samples in another order'): MixLoss(f)(torch.randn(6, 4, 6, 6), torch.randint(4, (6,6,6)), w=weight, plan=sides)

@pytest.mark.parametrize('time', [9, 6])
def test_predictions_that_have_time_first(time):
    "Also where there are as many steps as samples"
    p = torch.randn(time, 6, 4)
    def f(p, y): return F.cross_entropy(p.mean(0), y)
    torch.testing.assert_close(MixLoss(f)(p, y, plan=swap), mixed(ce, p=p.mean(0)))

# Own means
class OwnMean(nn.Module):
    reduction = 'mean'
    def __init__(self, extra=0):
        super().__init__()
        self.extra = extra
    def forward(self, p, y):
        u = F.cross_entropy(p, y, reduction=self.reduction)
        return u + self.extra*p.square().mean() if self.reduction=='mean' else u

def test_an_ignored_label_is_found_wherever_it_is():
    for i in range(6):
        target = y.clone()
        target[i] = -100
        for seed in range(4):
            plan = Plan.of(torch.randperm(6, generator=torch.Generator().manual_seed(seed)), torch.linspace(.5, 1., 6))
            with pytest.raises(ValueError, match='cannot be mixed sample by sample'): MixLoss(OwnMean())(pred, target, plan=plan)

def test_a_small_term_of_the_mean_alone():
    with pytest.raises(ValueError, match='cannot be mixed sample by sample'): MixLoss(OwnMean(1e-4))(pred, y, plan=sides)

class Proxy(nn.Module):
    "The mean over labels that are known, by a product that autocast makes in half precision"
    reduction = 'mean'
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.eye(4))
    def forward(self, p, y):
        u = (1-F.linear(F.normalize(p), self.w).gather(1, (y*(y>=0))[:,None])[:,0])*(y>=0)
        return u if self.reduction=='none' else u.sum()/(y>=0).sum()

def test_half_precision():
    target,p = torch.arange(64)%4,torch.randn(64, 4)
    target[:2] = -1
    plan = Plan.of(torch.arange(64).roll(1), torch.linspace(.5, 1., 64))
    with torch.autocast('cpu', torch.bfloat16), pytest.raises(ValueError, match='cannot be mixed sample by sample'): MixLoss(Proxy())(p, target, plan=plan)
    target = target.abs()
    torch.testing.assert_close(MixLoss(Proxy().bfloat16())(p.bfloat16(), target, plan=plan), MixLoss(Proxy())(p, target, plan=plan), rtol=.02, atol=.02)

def test_a_compiled_step():
    "It leaves the graph for a loss of your own, which is tried as elsewhere"
    for f,target in (OwnMean(),y),(OwnMean(),y.where(y>0, -100)),(Counts(),y):
        loss,plan = MixLoss(f),swap if isinstance(f, Counts) else sides
        step = torch.compile(lambda p,t,plan: loss(p, t, plan=plan), backend='eager')
        if (target<0).any():
            with pytest.raises(ValueError, match='cannot be mixed sample by sample'): step(pred, target, plan)
        else: torch.testing.assert_close(step(pred, target, plan), mixed(ce, plan))
    assert f.n==1

def test_a_plan_by_position():
    with pytest.raises(TypeError, match='plan=plan'): MixLoss(nn.CrossEntropyLoss())(pred, y, swap)

# Between the batches that are tested in full
many = torch.arange(16)%4
def plan_of(bs): return Plan.of(torch.arange(bs).roll(1), torch.linspace(.5, 1., bs))

class Ignores(nn.Module):
    "The mean over the labels that are not ignored, which its unreduced values do not tell"
    reduction = 'mean'
    def forward(self, p, y): return F.cross_entropy(p, y, ignore_index=7, reduction=self.reduction)

def test_a_label_that_is_ignored_in_later_batches_only():
    loss,p,ignored = MixLoss(Ignores()),torch.randn(16, 8),many.clone()
    ignored[5] = 7
    loss(p, many, plan=plan_of(16))
    with pytest.raises(ValueError, match='cannot be mixed sample by sample'):
        for _ in range(4): loss(p, ignored, plan=plan_of(16))
    half = MixLoss(Ignores())
    half(p[:8], many[:8], plan=plan_of(8))
    with pytest.raises(ValueError, match='cannot be mixed sample by sample'):
        for _ in range(4): half(p[:8], ignored[:8], plan=plan_of(8))

def test_a_refused_batch_leaves_the_loss_as_it_was():
    class Counts(Ignores):
        n = 0
        def forward(self, p, y):
            self.n += 1
            return super().forward(p, y)
    own,p = Counts(),torch.randn(16, 8)
    ignored = torch.where(many==many[5], 7, many)
    loss = MixLoss(own)
    for _ in range(2): loss(p, many, plan=plan_of(16))
    with pytest.raises(ValueError, match='cannot be mixed sample by sample'): loss(p, ignored, plan=plan_of(16))
    assert own.n==2

_calls = itertools.count()
class Counted(nn.Module):
    reduction = 'mean'
    def forward(self, p, y):
        next(_calls)   # a global, which is not restored
        return F.cross_entropy(p, y, reduction=self.reduction)

def test_a_batch_between_takes_three_calls():
    loss,p,n = MixLoss(Counted()),torch.randn(16, 8),[next(_calls)]
    for _ in range(3):
        loss(p, many, plan=plan_of(16))
        n.append(next(_calls))
    assert [b-a-1 for a,b in zip(n, n[1:])]==[9,3,3]

def test_a_reduction_that_makes_another_loss():
    "A loss that is made when `reduction` is set has the tensors of the first"
    class Remade(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('w', torch.ones(8))
            self.reduction = 'mean'
        @property
        def reduction(self): return self._reduction
        @reduction.setter
        def reduction(self, value): self._reduction,self.made = value,nn.BCEWithLogitsLoss(self.w, reduction='none')
        def forward(self, p, y):
            u = self.made(p, F.one_hot(y, 8).float()).mean(1)
            return u if self.reduction=='none' else u.mean()
    own,p = Remade(),torch.randn(16, 8)
    loss = MixLoss(own)
    for _ in range(3): loss(p, many, plan=plan_of(16))
    own.w.copy_(torch.arange(8.))
    torch.testing.assert_close(own(p, many), F.binary_cross_entropy_with_logits(p, F.one_hot(many, 8).float(), torch.arange(8.)))

def test_weights_that_come_later_with_one_lam():
    class Weighted(Ignores):
        w = None
        def forward(self, p, y): return super().forward(p, y) if self.w is None else (F.cross_entropy(p, y, reduction='none')*self.w).mean()
    own,p = Weighted(),torch.randn(6, 4)
    loss = MixLoss(own)
    loss(p, y, plan=swap)
    own.w = torch.rand(6)
    with pytest.raises(ValueError, match='in another order'):
        for _ in range(4): loss(p, y, plan=swap)

class Changes(nn.Module):
    "From its third batch on, it does something else"
    reduction,n = 'mean',0
    def __init__(self, later):
        super().__init__()
        self.later = later
    def forward(self, p, y):
        self.n += 1
        return (self.later if self.n>2 else F.cross_entropy)(p, y, reduction=self.reduction)

class Scaled(nn.Module):
    reduction,n = 'mean',0
    def forward(self, p, y):
        self.n += 1
        return F.cross_entropy(p, y, reduction=self.reduction)/self.n

class DropsOut(nn.Module):
    reduction = 'mean'
    def forward(self, p, y): return F.cross_entropy(F.dropout(p), y, reduction=self.reduction)

def writes(p, y, reduction='mean'): return F.cross_entropy(p.mul_(2), y, reduction=reduction)
def writes_labels(p, y, reduction='mean'):
    y.add_(1).remainder_(8)
    return F.cross_entropy(p, y, reduction=reduction)
def of_the_batch(p, y, reduction='mean'):
    u = F.cross_entropy(p, y, reduction='none')
    return u.square().mean().sqrt() if reduction=='mean' else u

def test_a_loss_that_changes():
    "It begins to write into its predictions or targets, which is seen in time; or to depend on the batch, which is refused"
    for later in writes,writes_labels,of_the_batch:
        loss,p = MixLoss(Changes(later)),torch.randn(16, 8)
        for _ in range(2): torch.testing.assert_close(loss(p, many, plan=plan_of(16)), mixed_many(p))
        if later is writes: torch.testing.assert_close(loss(p, many, plan=plan_of(16)), mixed_many(2*p))
        elif later is writes_labels: torch.testing.assert_close(loss(p, many, plan=plan_of(16)), mixed_many(p.roll(-1, 1)))
        else:
            with pytest.raises(ValueError, match='cannot be mixed sample by sample'): loss(p, many, plan=plan_of(16))

def test_a_mask_that_is_written_into_later():
    "It is cut, so it belongs to both targets of a mixture"
    n,p,masks = 0,torch.randn(16, 8),torch.randint(0, 2, (16, 4, 4))
    def of_class_and_mask(p, y, mask, reduction='mean'):
        nonlocal n
        n += 1
        if n>2: mask.mul_(2)
        u = F.cross_entropy(p, y, reduction='none') * (1+mask.flatten(1).float().mean(1))
        return u if reduction=='none' else u.mean()
    plan = CutMix().draw(torch.rand(16, 3, 4, 4))
    scale = plan.mix(masks).flatten(1).float().mean(1)
    loss,u = MixLoss(of_class_and_mask, y_int=True),plan.lam*ce(p, many) + (1-plan.lam)*ce(p, many[plan.idx])
    for factor in 1,1,2: torch.testing.assert_close(loss(p, many, masks, plan=plan), ((1+factor*scale)*u).mean())

# Each of these changes what it is called with, by ways that PyTorch does not count
def by_item(p, y, reduction='mean'):
    p['logits'] = 2*p['logits']
    return F.cross_entropy(p['logits'], y, reduction=reduction)

def by_data(p, y, reduction='mean'):
    p['logits'].data.mul_(2)
    return F.cross_entropy(p['logits'], y, reduction=reduction)

def by_numpy(p, y, reduction='mean'):
    p['logits'].detach().numpy()[:] *= 2
    return F.cross_entropy(p['logits'], y, reduction=reduction)

def by_hook(p, y, reduction='mean'):
    p['logits'].register_hook(lambda g: 2*g)
    return F.cross_entropy(p['logits'], y, reduction=reduction)

def by_attribute(p, y, reduction='mean'):
    if not hasattr(p['logits'], 'margin'): p['logits'].margin = F.one_hot(y, 8)
    return F.cross_entropy(p['logits']-p['logits'].margin, y, reduction=reduction)

changes = [(by_item, lambda p,y: ce(2*p, y)), (by_data, None), (by_numpy, None), (by_hook, ce), (by_attribute, lambda p,y: ce(p-F.one_hot(y, 8), y))]

@pytest.mark.parametrize('per_batch', [False, True])
@pytest.mark.parametrize('f,u', changes)
def test_changes_that_are_not_counted(f, u, per_batch):
    loss,p,plan = MixLoss(f),torch.randn(16, 8, requires_grad=True),plan_of(16)
    if per_batch: plan = Plan.of(plan.idx, torch.tensor([.7]))
    def mean(u): return (plan.lam*u(p, many) + (1-plan.lam)*u(p, many[plan.idx])).mean()
    want = mean(u or (lambda p,y: ce(2*p, y)))
    grad, = torch.autograd.grad(want if u else mean(lambda p,y: ce(2*p.detach() + (p-p.detach()), y)), p)   # a gradient does not see such a factor
    for _ in range(6):
        got = loss({'logits': p*1}, many, plan=plan)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, p)[0], 2*grad if f is by_hook else grad)

def mixed_many(p, u=ce):
    plan = plan_of(16)
    return (plan.lam*u(p.clone(), many) + (1-plan.lam)*u(p.clone(), many[plan.idx])).mean()

@pytest.mark.parametrize('f,u', [(Margin(), lambda p,y: margin(p, y, 'none')), (nn.CrossEntropyLoss(), ce), (DropsOut(), None)], ids=['writes','standard','draws'])
def test_many_batches(f, u):
    loss,p,counts = MixLoss(f),torch.randn(16, 8),Scaled()
    for i in range(40):
        torch.manual_seed(i)
        got = loss(p, many, plan=plan_of(16))
        torch.manual_seed(i)
        torch.testing.assert_close(got, mixed_many(p, u) if u else mixed_dropout(p))
        torch.testing.assert_close(MixLoss(counts)(p, many, plan=plan_of(16)), mixed_many(p)/(i+1))
    assert counts.n==40

def mixed_dropout(p):
    def u(p, y):
        torch.manual_seed(torch.initial_seed())
        return ce(F.dropout(p), y)
    return mixed_many(p, u)

@pytest.mark.parametrize('bs', [7, 8, 11, 15])
def test_each_sample_is_tested_with_each_target(bs):
    "One ignored label, in any row, is found within four batches"
    p,labels = torch.randn(bs, 8),torch.arange(bs)%4
    for row in range(bs):
        loss,ignored = MixLoss(Ignores()),labels.clone()
        loss(p, labels, plan=plan_of(bs))
        ignored[row] = 7
        with pytest.raises(ValueError, match='cannot be mixed sample by sample'):
            for _ in range(4): loss(p, ignored, plan=plan_of(bs))

def test_one_loss_for_two_targets():
    "Each target has its own tests"
    def by_place(p, y): return (ce(p, y.clamp(max=3))*torch.linspace(.1, 2, len(y))).mean() if (y>3).any() else F.cross_entropy(p, y)
    loss,p = MixLoss(MultiLoss(by_place, by_place)),torch.randn(6, 8)
    with pytest.raises(ValueError, match='in another order'): loss((p,p), y, torch.arange(6), plan=swap)

@pytest.mark.parametrize('extra', [None, torch.tensor(1.)])
def test_weights_beside_predictions_with_other_parts(extra):
    w = torch.rand(6)
    with pytest.raises(ValueError, match='in another order'):
        MixLoss(lambda p,y: (ce(p['logits'], y)*w).mean())(dict(logits=pred, extra=extra), y, plan=swap)

def test_each_fit_tests_a_loss_anew():
    class Weighted(nn.Module):
        w = None
        def forward(self, p, y): return F.cross_entropy(p, y) if self.w is None else (ce(p, y)*self.w).mean()
    learn = mk_learn(class_dls(n=8), loss_func=Weighted(), cbs=MixUp(1.))   # one batch an epoch
    quiet_fit(learn)
    learn.loss_func.w = torch.rand(8)
    with pytest.raises(ValueError, match='in another order'): quiet_fit(learn)
