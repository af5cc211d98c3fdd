"Every loss, exactly: a real fit's mixed losses against the definition, written out by hand and in double precision"
import functools, weakref
from functools import partial
import pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.callback.core import Callback
from fastai.losses import BaseLoss, BCEWithLogitsLossFlat, CrossEntropyLossFlat, DiceLoss, FocalLossFlat, L1LossFlat, LabelSmoothingCrossEntropy
from fastai.losses import LabelSmoothingCrossEntropyFlat, MSELossFlat
from fastai.torch_core import TensorBase, TensorCategory
from fastmix.bench import count_ops, loss_steps
from fastmix.callback import CutMix, MixUp
from fastmix.core import BlendPlan
from fastmix.loss import MixLoss
from fastmix.mixes import Blend, Cut
from helpers import Record, class_dls, mk_dls, mk_learn, quiet_fit

C = 4
w = torch.tensor([.2, 1., 3., 8.])

def logp(p): return p - p.exp().sum(-1, keepdim=True).log()

def ce(weight=None, smooth=0., gamma=0., ignore=-100):
    "Unreduced cross-entropy of one prediction and one class, and its weight in a mean"
    wt = torch.ones(C) if weight is None else weight
    def u(p, y):
        if y==ignore: return 0., 0.
        nll = -logp(p.double())*wt
        res = (1-smooth)*nll[y] + smooth/C*nll.sum()
        return ((1-(-res).exp())**gamma*res, 1.) if gamma else (res, wt[y].item())
    return u

def mean_of(u, plan, pred, y, reduction='mean'):
    "The definition, one sample, one position and one target at a time"
    num = den = 0.
    for i in range(len(y)):
        lam,j = plan.lam[i if len(plan.lam)>1 else 0].double().item(), plan.idx[i]
        for share,t in ((lam,y[i]), (1-lam,y[j])):
            for p_,t_ in zip(pred[i].reshape(-1, pred.shape[-1]), t.reshape(-1)):
                val,weight = u(p_, t_)
                num,den = num+share*val, den+share*weight
    return num/den if reduction=='mean' else num

def close(a, b): torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=2e-6, atol=1e-6)

def fit(loss_func, dls=None, model=None, cb=None):
    learn = mk_learn(dls or class_dls(), model, loss_func, cbs=[cb or MixUp(1.), Record()])
    batches = quiet_fit(learn).record.batches
    assert learn.loss_func is loss_func and batches
    return batches

CE,FL,LS = CrossEntropyLossFlat,FocalLossFlat,LabelSmoothingCrossEntropyFlat
class_losses = [(CE(), ce()), (CE(weight=w), ce(w)), (CE(ignore_index=2), ce(ignore=2)), (CE(weight=w, ignore_index=1), ce(w, ignore=1)),
    (CE(weight=w, reduction='sum'), ce(w))]
class_losses += [(LS(), ce(smooth=.1)), (LS(eps=.3, reduction='sum'), ce(smooth=.3)), (LabelSmoothingCrossEntropy(), ce(smooth=.1)),
    (FL(), ce(gamma=2.)), (FL(weight=w), ce(w, gamma=2.)), (FL(gamma=1., reduction='sum'), ce(gamma=1.))]
class_losses += [(nn.CrossEntropyLoss(), ce()), (nn.CrossEntropyLoss(w), ce(w)), (nn.CrossEntropyLoss(ignore_index=0), ce(ignore=0)),
    (nn.CrossEntropyLoss(w, reduction='sum'), ce(w)), (nn.CrossEntropyLoss(label_smoothing=.2), ce(smooth=.2)),
    (nn.CrossEntropyLoss(w, label_smoothing=.2, ignore_index=3), ce(w, .2, ignore=3))]
class_losses += [(F.cross_entropy, ce()), (partial(F.cross_entropy, weight=w), ce(w)), (partial(F.cross_entropy, ignore_index=1, weight=w), ce(w, ignore=1)),
    (partial(F.cross_entropy, reduction='sum'), ce()), (partial(F.cross_entropy, label_smoothing=.1), ce(smooth=.1))]

@pytest.mark.parametrize('per_batch', [False, True])
@pytest.mark.parametrize('loss_func,u', class_losses, ids=str)
def test_classes(loss_func, u, per_batch):
    red = getattr(loss_func, 'reduction', 'sum' if getattr(loss_func, 'keywords', {}).get('reduction')=='sum' else 'mean')
    for b in fit(loss_func, cb=MixUp(1., per_batch=per_batch)):
        assert len(b['plan'].lam) == (1 if per_batch else 8)
        close(b['loss'], mean_of(u, b['plan'], b['pred'].detach(), b['yb'][0], red))

@pytest.mark.parametrize('loss_func', [LS(weight=w), LabelSmoothingCrossEntropy(weight=w)], ids=str)
def test_weighted_smoothing_has_two_normalisers(loss_func):
    for b in fit(loss_func):
        args = b['plan'], b['pred'].detach(), b['yb'][0]
        close(b['loss'], .9*mean_of(ce(w), *args) + .1*mean_of(lambda p,y: (-logp(p.double()).mean(), 1.), *args))

@pytest.mark.parametrize('loss_func,_', class_losses + [(LS(weight=w), None)], ids=str)
def test_lam_one_is_the_plain_loss(loss_func, _):
    pred,y = torch.randn(8, C), torch.arange(8)%C
    plan = BlendPlan(torch.ones(8), torch.randperm(8))
    close(MixLoss(loss_func)(pred, y, plan=plan), loss_func(pred, y))

def bce(p, y, pw=1.): return -(pw*y*p.sigmoid().log() + (1-y)*(1-p.sigmoid()).log())

@pytest.mark.parametrize('loss_func,pw,dtype', [
    (BCEWithLogitsLossFlat(), 1., torch.float), (BCEWithLogitsLossFlat(), 1., torch.long), (BCEWithLogitsLossFlat(), 1., torch.bool),
    (BCEWithLogitsLossFlat(pos_weight=w), w, torch.float), (BCEWithLogitsLossFlat(pos_weight=w), w, torch.long),
    (nn.BCEWithLogitsLoss(pos_weight=w), w, torch.float), (F.binary_cross_entropy_with_logits, 1., torch.float)], ids=str)
def test_multi_label(loss_func, pw, dtype):
    ys = torch.randint(0, 2, (32, C)).to(dtype)
    for b in fit(loss_func, mk_dls([torch.randn(32, 6)], [ys])):
        lam,y = b['plan'].lam[:,None].double(), b['yb'][0].double()
        p = b['pred'].detach().double()
        close(b['loss'], (lam*bce(p, y, pw) + (1-lam)*bce(p, y[b['plan'].idx], pw)).mean())

@pytest.mark.parametrize('shape', [(32,), (32,1)])
@pytest.mark.parametrize('loss_func,f', [(MSELossFlat(), torch.square), (L1LossFlat(), torch.abs), (F.mse_loss, torch.square),
    (nn.L1Loss(reduction='sum'), torch.abs)], ids=str)
def test_regression(loss_func, f, shape):
    model = nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)) if len(shape)==1 else nn.Linear(6, 1)
    for b in fit(loss_func, mk_dls([torch.randn(32, 6)], [torch.randn(shape)]), model):
        lam,y = b['plan'].lam.double(), b['yb'][0].double().flatten()
        err = f(b['pred'].detach().double().flatten() - lam*y - (1-lam)*y[b['plan'].idx])
        close(b['loss'], err.sum() if getattr(loss_func, 'reduction', '')=='sum' else err.mean())

def no_reduction(p, y): return F.cross_entropy(p, y, weight=w)**2

def test_plain_python_loss_takes_one_lam_and_says_so_once():
    with pytest.warns(UserWarning, match='no_reduction') as said: batches = fit(no_reduction, cb=MixUp(1.))
    assert len([o for o in said if 'one λ for each batch' in str(o.message)]) == 1
    for b in batches:
        lam, = b['plan'].lam
        p,y = b['pred'], b['yb'][0]
        close(b['loss'], lam*no_reduction(p, y) + (1-lam)*no_reduction(p, y[b['plan'].idx]))

def own_mean(p, y, reduction='mean'):
    u = F.cross_entropy(p, y, reduction='none')
    return u if reduction=='none' else u.sum()/(y+1).sum()

def test_a_mean_that_is_none_is_refused():
    with pytest.raises(ValueError, match='per_batch=True'): fit(own_mean)
    assert fit(own_mean, cb=MixUp(1., per_batch=True))

# Segmentation: void pixels are class 3
def seg_dls(): return mk_dls([torch.randn(16, 3, 6, 5)], [torch.randint(0, C, (16, 6, 5))])
def seg_model(): return nn.Conv2d(3, C, 1)

@pytest.mark.parametrize('kw', [{}, dict(weight=w), dict(ignore_index=3), dict(weight=w, ignore_index=3), dict(weight=w, reduction='sum')], ids=str)
def test_segmentation(kw):
    u = ce(kw.get('weight'), ignore=kw.get('ignore_index', -100))
    for b in fit(CrossEntropyLossFlat(axis=1, **kw), seg_dls(), seg_model()):
        close(b['loss'], mean_of(u, b['plan'], b['pred'].detach().permute(0,2,3,1), b['yb'][0], kw.get('reduction', 'mean')))

@pytest.mark.parametrize('kw', [{}, dict(weight=w, ignore_index=3)], ids=str)
def test_a_cut_mask_takes_the_plain_loss(kw):
    loss_func = CrossEntropyLossFlat(axis=1, **kw)
    for b in fit(loss_func, seg_dls(), seg_model(), CutMix()):
        x,x1,y = b['xb'][0], b['xb'][0][b['plan'].idx], b['yb'][0].clone()
        pasted = (b['mixed'][0] != x).any(1)          # the pixels that differ are the partner's
        assert b['mixed'][0].movedim(1,-1)[pasted].equal(x1.movedim(1,-1)[pasted]) and pasted.any()
        y[pasted] = b['yb'][0][b['plan'].idx][pasted]
        close(b['loss'], loss_func(b['pred'], y))

def dice(p, t):
    "Dice of one image, summed over classes"
    p = p.softmax(0)
    return sum(1 - (2*(p[c]*(t==c)).sum()+1e-6)/((p[c]+(t==c)).sum()+1e-6) for c in range(C))

@pytest.mark.parametrize('reduction', ['sum', 'mean'])
def test_dice_is_mixed_per_image(reduction):
    for b in fit(DiceLoss(reduction=reduction), seg_dls(), seg_model()):
        plan,p,y = b['plan'], b['pred'].detach().double(), b['yb'][0]
        want = sum(l*dice(p[i], y[i]) + (1-l)*dice(p[i], y[j]) for i,(l,j) in enumerate(zip(plan.lam.double(), plan.idx)))
        close(b['loss'], want/(len(y)*C) if reduction=='mean' else want)

class CeAndDice:
    def __init__(self): self.ce,self.dice = CrossEntropyLossFlat(axis=1, weight=w), DiceLoss()
    def __call__(self, p, y): return self.ce(p, y) + self.dice(p, y)
    def activation(self, p): return p.softmax(1)

def test_ce_and_dice():
    loss_func = CeAndDice()
    for cb in MixUp(1.), CutMix(1.):
        with pytest.warns(UserWarning, match='CeAndDice'): batches = fit(loss_func, seg_dls(), seg_model(), cb)
        for b in batches:
            (lam,),idx = b['plan'].lam, b['plan'].idx
            y,y1 = b['yb'][0], b['yb'][0][idx]
            if isinstance(cb, MixUp): close(b['loss'], lam*loss_func(b['pred'], y) + (1-lam)*loss_func(b['pred'], y1))
            else:
                pasted = (b['mixed'][0] != b['xb'][0]).any(1)
                close(b['loss'], loss_func(b['pred'], torch.where(pasted, y1, y)))

def two_targets(p, y, t, reduction='mean'):
    u = F.cross_entropy(p[:,:C], y, reduction='none') + F.mse_loss(p[:,C], t, reduction='none')
    return u.mean() if reduction=='mean' else u

def test_class_and_number_together():
    dls = mk_dls([torch.randn(32, 6)], [torch.randint(0, C, (32,)), torch.randn(32)])
    for b in fit(two_targets, dls, nn.Linear(6, C+1)):
        plan,(y,t),p = b['plan'], b['yb'], b['pred'].detach()
        own,other = (F.cross_entropy(p[:,:C], y[i], reduction='none') + (p[:,C]-t[i])**2 for i in plan.pairs.T)
        close(b['loss'], (plan.lam*own + (1-plan.lam)*other).mean())

def weighed(p, y, w, reduction='mean'):
    "Each class counts by a weight of its own, as in the weight maps of a U-Net"
    u = F.cross_entropy(p, y, reduction='none')*w
    return u if reduction=='none' else u.mean()

@pytest.mark.parametrize('per_batch', [False,True])
@pytest.mark.parametrize('shape', [(), (5,)], ids=str)
def test_classes_and_their_weights(shape, per_batch):
    "A weight stays with its class: labels with weight 0 pull at nothing"
    y = torch.randint(0, C, (32,*shape))
    dls = mk_dls([torch.randn(32, 6)], [y, (y!=2).float()*torch.rand(y.shape)])
    model = nn.Sequential(nn.Linear(6, C*5), nn.Unflatten(1, (C,5))) if shape else nn.Linear(6, C)
    for b in fit(weighed, dls, model, MixUp(1., per_batch=per_batch)):
        plan,(y,w),p = b['plan'],b['yb'],b['pred'].detach()
        u = [(F.cross_entropy(p, y[i], reduction='none')*w[i]).flatten(1).mean(1) if shape else F.cross_entropy(p, y[i], reduction='none')*w[i] for i in plan.pairs.T]
        close(b['loss'], (plan.lam*u[0] + (1-plan.lam)*u[1]).mean())

class Aux(nn.Module):
    "A head and an auxiliary head"
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(6, C), nn.Linear(6, C)
    def forward(self, x): return self.a(x), self.b(x)

def aux_loss(p, y, reduction='mean'): return F.cross_entropy(p[0], y, reduction=reduction) + .4*F.cross_entropy(p[1], y, reduction=reduction)

def test_nll():
    for b in fit(nn.NLLLoss(w), model=nn.Sequential(nn.Linear(6, C), nn.LogSoftmax(1))):
        close(b['loss'], mean_of(ce(w), b['plan'], b['pred'].detach(), b['yb'][0]))

def test_smoothing_with_ignored_targets():
    "fastai's own smoothing leaves the ignored ones out of one term only"
    y = torch.randint(0, C, (32,)).where(torch.arange(32)%3>0, -100)
    for b in fit(LS(), mk_dls([torch.randn(32, 6)], [y])):
        args = b['plan'], b['pred'].detach(), b['yb'][0]
        close(b['loss'], .9*mean_of(ce(), *args) + .1*mean_of(lambda p,y: (-logp(p.double()).mean(), 1.), *args))

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_losses_are_mixed_in_single(dtype):
    pred,y = torch.randn(64, C).to(dtype), torch.arange(64)%C
    plan = Blend(1.).draw(pred)
    u,u1 = (F.cross_entropy(pred, o, reduction='none').double() for o in (y,y[plan.idx]))
    got = MixLoss(nn.CrossEntropyLoss())(pred, y, plan=plan)
    assert got.dtype==torch.float32
    close(got, (plan.lam*u + (1-plan.lam)*u1).mean())

@pytest.mark.parametrize('per_batch', [False, True])
def test_partners_that_are_no_permutation(per_batch):
    "The normaliser is mixed with one λ too"
    pred,y = torch.randn(8, C), torch.arange(8)%C
    plan = BlendPlan(torch.tensor([.7]) if per_batch else torch.rand(8), torch.tensor([3]*8))
    close(MixLoss(nn.CrossEntropyLoss(w))(pred, y, plan=plan), mean_of(ce(w), plan, pred, y))

@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int32], ids=str)
def test_small_integers(dtype):
    "Class 156 is not -100, wrapped around"
    n = 100 if dtype==torch.int8 else 157
    pred,y = torch.randn(8, n), torch.full((8,), n-1)
    plan,loss_func = Blend(1.).draw(pred), CrossEntropyLossFlat(weight=torch.rand(n))
    close(MixLoss(loss_func)(pred, y.to(dtype), plan=plan), MixLoss(loss_func)(pred, y, plan=plan))

def test_a_loop_without_a_learner_is_mixed_only_where_it_says_so():
    pred,y = torch.randn(8, C), torch.arange(8)%C
    loss = MixLoss(nn.CrossEntropyLoss())
    loss(pred, y, plan=Blend(1.).draw(pred))
    assert loss(pred, y).equal(F.cross_entropy(pred, y)) and not loss.targets

def test_a_call_that_fails_leaves_nothing_armed():
    pred,y,loss = torch.randn(8, C), torch.arange(8)%C, MixLoss(nn.CrossEntropyLoss())
    with pytest.raises(Exception): loss(pred[:4], y, plan=Blend(1.).draw(pred))
    assert loss.plan is None and not loss.targets
    loss = MixLoss(nn.BCEWithLogitsLoss())
    loss(pred, torch.rand(8, C), plan=Blend(1.).draw(pred))
    assert loss.plan is None and not loss.targets

def twice(f): return lambda *args, **kwargs: 2*f(*args, **kwargs)
def own_forward(f):
    f.forward = twice(f.forward)
    return f
def hooked(f):
    f.register_forward_hook(lambda f, args, res: 2*res)
    return f
def hooked_before(f):
    f.register_forward_pre_hook(lambda f, args: (2*args[0], args[1]))
    return f
def inside(f):
    own_forward(f.func)
    return f

changed = [own_forward(nn.CrossEntropyLoss()), hooked(nn.CrossEntropyLoss()), inside(CE()), hooked_before(nn.CrossEntropyLoss())]

@pytest.mark.parametrize('f', changed, ids=['forward','hook','inside','pre-hook'])
def test_a_changed_loss_is_not_taken_for_the_published_one(f):
    pred,y,plan = torch.randn(8, C), torch.arange(8)%C, Blend(1.).draw(torch.rand(8, C))
    want = mean_of(ce(), plan, 2*pred, y) if f._forward_pre_hooks else 2*mean_of(ce(), plan, pred, y)
    close(MixLoss(f)(pred, y, plan=plan), want)

def test_backward_hooks_are_heard():
    pred,heard = torch.randn(8, C, requires_grad=True), []
    loss_func = nn.CrossEntropyLoss()
    loss_func.register_full_backward_hook(lambda f, grads, out: heard.append(1))
    MixLoss(loss_func)(pred, torch.arange(8)%C, plan=Blend(1.).draw(pred)).backward()
    assert heard

@pytest.mark.parametrize('cls,name', [(nn.CrossEntropyLoss,'forward'), (CE,'__call__'), (BaseLoss,'__call__')], ids=str)
def test_a_changed_class_is_not_taken_for_the_published_one(cls, name, monkeypatch):
    pred,y,plan,loss_func = torch.randn(8, C), torch.arange(8)%C, Blend(1.).draw(torch.rand(8, C)), CE()
    monkeypatch.setattr(cls, name, twice(getattr(cls, name)))
    close(MixLoss(loss_func)(pred, y, plan=plan), 2*mean_of(ce(), plan, pred, y))

class Hidden(nn.Module):
    "Void targets that no attribute tells of"
    reduction = 'mean'
    def forward(self, p, y): return F.cross_entropy(p, y, ignore_index=3, reduction=self.reduction)

def test_a_loss_is_checked_in_every_batch():
    y = torch.tensor([0]*8 + [3,1]*4)
    with pytest.raises(ValueError, match='per_batch=True'): fit(Hidden(), mk_dls([torch.randn(16, 6)], [y]))

def test_auxiliary_head():
    for b in fit(aux_loss, model=Aux()):
        args = [(b['plan'], p.detach(), b['yb'][0]) for p in b['pred']]
        close(b['loss'], mean_of(ce(), *args[0]) + .4*mean_of(ce(), *args[1]))

def test_probabilities():
    "Cross-entropy is linear in its target, so it is all one whether the losses or the targets are mixed"
    ys = torch.rand(32, C).softmax(1)
    for loss_func in nn.CrossEntropyLoss(w), CE(flatten=False, weight=w):
        for b in fit(loss_func, mk_dls([torch.randn(32, 6)], [ys])):
            lam,y = b['plan'].lam[:,None], b['yb'][0]
            y = lam*y + (1-lam)*y[b['plan'].idx]
            close(b['loss'], -(y*w*logp(b['pred'].detach())).sum(1).mean())

def two_heads(p, y, reduction='mean'):
    u = torch.cat([F.cross_entropy(o, y, reduction='none') for o in p])
    return u.mean() if reduction=='mean' else u

def test_a_loss_that_is_not_sample_after_sample_is_refused():
    with pytest.raises(ValueError, match='per_batch=True'): fit(two_heads, model=Aux())
    assert fit(two_heads, model=Aux(), cb=MixUp(1., per_batch=True))

def test_fastais_own_tensor_classes_in_a_plain_loop():
    pred,y = torch.randn(8, C), torch.arange(8)%C
    plan = Blend(1.).draw(pred)
    for f in CE(weight=w), nn.CrossEntropyLoss(w, ignore_index=2):
        close(MixLoss(f)(TensorBase(pred), TensorCategory(y), plan=plan), MixLoss(f)(pred, y, plan=plan))

@pytest.mark.parametrize('y_int', [True, False])
def test_the_user_can_override(y_int):
    "L1 of blended numbers is not the blend of L1s"
    dls = mk_dls([torch.randn(32, 6)], [torch.randn(32,1)])
    for b in fit(F.l1_loss, dls, nn.Linear(6, 1), MixUp(1., y_int=y_int)):
        lam,y,p = b['plan'].lam[:,None], b['yb'][0], b['pred'].detach()
        y1 = y[b['plan'].idx]
        close(b['loss'], (lam*(p-y).abs() + (1-lam)*(p-y1).abs()).mean() if y_int else (p - lam*y - (1-lam)*y1).abs().mean())

class LossesMixed(nn.L1Loss):
    y_int = True
class TargetsBlended(nn.L1Loss):
    y_int = False

@pytest.mark.parametrize('loss_func,y', [(LossesMixed(), torch.randn(32,1)), (TargetsBlended(), torch.randint(0, 9, (32,1)))], ids=repr)
def test_a_loss_with_y_int_decides(loss_func, y):
    "Against the target's type, which says otherwise"
    for b in fit(loss_func, mk_dls([torch.randn(32, 6)], [y]), nn.Linear(6, 1)):
        lam,y,p = b['plan'].lam[:,None], b['yb'][0], b['pred'].detach()
        y1 = y[b['plan'].idx]
        close(b['loss'], (lam*(p-y).abs() + (1-lam)*(p-y1).abs()).mean() if loss_func.y_int else (p - lam*y - (1-lam)*y1).abs().mean())

def test_gradient():
    "The gradient of the mixed loss is that of cross-entropy with the mixed one-hot target"
    pred,y = torch.randn(8, C, requires_grad=True), torch.randint(0, C, (8,))
    plan = Blend(1.).draw(pred.detach())
    g, = torch.autograd.grad(MixLoss(CrossEntropyLossFlat())(pred, y, plan=plan), pred)
    one_hot = torch.eye(C)[y]
    torch.testing.assert_close(g, (pred.softmax(1) - plan.lam[:,None]*one_hot - (1-plan.lam[:,None])*one_hot[plan.idx]).detach()/8)

dense = [(CE(axis=1), ce()), (CE(axis=1, weight=w, ignore_index=2), ce(w, ignore=2)), (LS(axis=1), ce(smooth=.1))]
dense += [(nn.CrossEntropyLoss(w, ignore_index=1), ce(w, ignore=1)), (nn.CrossEntropyLoss(w, label_smoothing=.2, ignore_index=3), ce(w, .2, ignore=3))]
dense += [(nn.NLLLoss(w), lambda p,y: (-p[y].double()*w[y], w[y].item()))]

@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('loss_func,u', dense, ids=str)
def test_one_softmax_for_dense_classes(loss_func, u, reduction):
    "Classes in dimension 1, and masks with and without a channel where fastai flattens them"
    pred,y,plan = torch.randn(3, C, 4, 5), torch.randint(0, C, (3, 4, 5)), Blend(1.).draw(torch.rand(3, 1))
    loss,loss_func.reduction = MixLoss(loss_func),reduction
    want = mean_of(u, plan, pred.movedim(1, -1), y, reduction)
    close(loss(pred, y, plan=plan), want)
    if hasattr(loss_func, 'axis'): close(loss(pred, y[:,None], plan=plan), want)
    loss_func.reduction = 'mean'

@pytest.mark.parametrize('loss_func', [CE(axis=1), CE(axis=1, weight=w), LS(axis=1), nn.CrossEntropyLoss(w, label_smoothing=.1), nn.CrossEntropyLoss()], ids=str)
def test_unreduced_values_come_in_the_plain_order(loss_func):
    pred,y = torch.randn(3, C, 4, 5), torch.randint(0, C, (3, 4, 5))
    loss_func.reduction = 'none'
    got,want = MixLoss(loss_func)(pred, y, plan=BlendPlan(torch.ones(3), torch.tensor([2,0,1]))), loss_func(pred, y)
    loss_func.reduction = 'mean'
    assert got.shape==want.shape
    close(got, want)

@pytest.mark.parametrize('loss_func', [CE(), nn.CrossEntropyLoss(), F.cross_entropy, LS()], ids=str)
@pytest.mark.parametrize('y', [torch.arange(4)%C, torch.arange(16).view(8, 2)%C, torch.full((8,), C), torch.full((8,), -1)], ids=['short', 'long', 'above', 'below'])
def test_targets_that_do_not_fit_are_errors(loss_func, y):
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        MixLoss(loss_func)(torch.randn(8, C), y, plan=BlendPlan(torch.rand(len(y)), torch.arange(len(y)).flip(0)))

def test_legacy_arguments_are_not_guessed():
    pred,y = torch.randn(8, C), torch.arange(8)%C
    for f in partial(F.cross_entropy, size_average=False), CE(weight=w, flatten=False):
        with pytest.raises(ValueError, match='per_batch=True'): MixLoss(f)(pred, y, plan=Blend(.4).draw(pred))

@pytest.mark.parametrize('shape', [(8,21,256,256), (64,30_000)], ids=str)
def test_a_mixed_loss_takes_the_memory_of_a_plain_one(shape):
    "At its peak, within 15 %; all in all, much less than two losses ask for"
    steps = loss_steps(shape)
    plain,two,ours = (count_ops(steps[o]) for o in ('plain','two losses','fastmix'))
    assert ours['fresh MB'] < .7*two['fresh MB']
    assert ours['peak MB'] < 1.15*plain['peak MB'] < .9*two['peak MB']

def test_gradients_of_a_mixed_loss():
    pred,y,plan = torch.randn(6, C, dtype=torch.float64, requires_grad=True), torch.arange(6)%C, Blend(1.).draw(torch.rand(6, 1))
    loss = MixLoss(nn.CrossEntropyLoss(w.double(), label_smoothing=.1))
    assert torch.autograd.gradcheck(lambda p: loss(p, y, plan=plan), pred)
    assert torch.autograd.gradgradcheck(lambda p: loss(p, y, plan=plan), pred)

def test_a_class_that_is_masked_out():
    "An ignored target adds 0, and not 0 times the infinite loss of some class"
    pred,y,plan = torch.randn(4, C), torch.tensor([1,2,-100,3]), BlendPlan(torch.tensor([.9,.8,.7,.6]), torch.tensor([1,2,3,0]))
    pred[:,0] = -1e4
    close(MixLoss(nn.CrossEntropyLoss())(pred.where(pred>-1e4, -torch.inf), y, plan=plan), mean_of(ce(), plan, pred, y))

def test_an_ignored_row_may_hold_anything():
    "Beside label smoothing too, as in PyTorch"
    pred,y,plan = torch.randn(4, C), torch.tensor([1,2,-100,-100]), BlendPlan(torch.tensor([.9,.8,.7,.6]), torch.tensor([1,0,3,2]))
    want = mean_of(ce(smooth=.1, ignore=-100), plan, pred, y)
    pred[2:] = torch.tensor([torch.inf,-torch.inf,torch.nan,0.])
    close(MixLoss(nn.CrossEntropyLoss(label_smoothing=.1))(pred, y, plan=plan), want)

def test_an_unknown_reduction_is_the_losses_own_error():
    pred = torch.randn(4, C)
    with pytest.raises(ValueError, match='avg'): MixLoss(nn.CrossEntropyLoss(reduction='avg'))(pred, torch.arange(4), plan=Blend().draw(pred))

def test_a_weighted_mean_is_not_the_mean_of_weighted_losses():
    "PyTorch's regression losses divide by the sum of the weights"
    pred,y,plan = torch.randn(8, 2), torch.randn(8, 2), Blend(1.).draw(torch.rand(8, 1))
    with pytest.raises(ValueError, match='per_batch=True'):
        MixLoss(partial(F.mse_loss, weight=torch.rand(8, 2)), y_int=True)(pred, y, plan=plan)

compiled = [nn.CrossEntropyLoss(), CE(weight=w, axis=1), LS(), F.cross_entropy, partial(F.cross_entropy, label_smoothing=.1), nn.BCEWithLogitsLoss()]

@pytest.mark.parametrize('mix', [Blend(.4), Blend(.4, per_batch=True), Cut()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize('loss_func', compiled, ids=str)
def test_a_compiled_step_is_one_graph(loss_func, mix):
    "For all batches, with nothing left outside of it"
    x,model,graphs = torch.rand(8, 3, 6, 6), nn.Sequential(nn.Flatten(), nn.Linear(108, C)), []
    y = torch.rand(8, C) if isinstance(loss_func, nn.BCEWithLogitsLoss) else torch.arange(8)%C
    def step(x, y, plan): return MixLoss(loss_func)(model(plan.mix(x)), y, plan=plan)
    def backend(graph, inputs): return graphs.append(graph) or graph.forward
    torch.compiler.reset()
    fast = torch.compile(step, fullgraph=True, backend=backend)
    for plan in [mix.draw(x) for _ in range(4)]:
        close(fast(x, y, plan).detach(), step(x, y, plan).detach())
        close(*(torch.autograd.grad(f(x, y, plan), model[1].weight)[0] for f in (fast, step)))
    assert len(graphs)==1

def test_validation_holds_no_targets():
    "A `MixLoss` that is called without a plan forgets what it was called with"
    loss,y = MixLoss(nn.MSELoss()),torch.rand(4)
    ref = weakref.ref(y)
    loss(torch.rand(4), y)
    del y
    assert ref() is None

def wrapped(hands_on):
    def narrow(pred, y): return 2*F.cross_entropy(pred, y)
    def wide(*args, **kwargs): return 2*F.cross_entropy(*args, **kwargs)
    return functools.wraps(F.cross_entropy)(wide if hands_on else narrow)

def test_a_loss_that_wraps_another_has_its_own_arguments():
    "And those of the other where it hands keywords on"
    for b in fit(wrapped(True)): close(b['loss'], 2*mean_of(ce(), b['plan'], b['pred'].detach(), b['yb'][0]))
    with pytest.warns(UserWarning, match='one λ for each batch'): batches = fit(wrapped(False))
    for b in batches: close(b['loss'], 2*mean_of(ce(), b['plan'], b['pred'].detach(), b['yb'][0]))

def test_tensors_of_the_samples_as_keywords_are_refused():
    pred,y,plan = torch.randn(8, C), torch.arange(8)%C, Blend(1.).draw(torch.rand(8, C))
    with pytest.raises(ValueError, match='w, of shape .8,., seems to belong to the samples'): MixLoss(weighed)(pred, y, w=torch.rand(8), plan=plan)
    close(MixLoss(F.cross_entropy)(pred, y, weight=w, plan=plan), mean_of(ce(w), plan, pred, y))
    assert MixLoss(weighed)(pred, y, w=torch.ones(8)).isclose(F.cross_entropy(pred, y))   # not mixed

signs = [(nn.HingeEmbeddingLoss(), F.hinge_embedding_loss), (nn.SoftMarginLoss(), F.soft_margin_loss), (F.soft_margin_loss, F.soft_margin_loss)]
@pytest.mark.parametrize('loss_func,f', signs, ids=str)
def test_signs_are_classes(loss_func, f):
    y = torch.randn(32).sign()
    for b in fit(loss_func, mk_dls([torch.randn(32, 6)], [y]), nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))):
        u = [f(b['pred'].detach(), b['yb'][0][i], reduction='none') for i in b['plan'].pairs.T]
        close(b['loss'], (b['plan'].lam*u[0] + (1-b['plan'].lam)*u[1]).mean())

class HalfIgnored(nn.CrossEntropyLoss):
    "Void targets that no attribute tells of, few of them"
    def forward(self, p, y): return F.cross_entropy(p, y.where(y!=3, -100), reduction=self.reduction)

def test_a_loss_is_checked_closely_in_half_precision():
    pred,y = torch.randn(64, C).bfloat16(), torch.tensor([3]*3 + [0,1,2]*20 + [1])
    with pytest.raises(ValueError, match='can not be mixed sample by sample'): MixLoss(HalfIgnored())(pred, y, plan=Blend(1.).draw(torch.rand(64, C)))

def test_targets_in_another_layout_are_others():
    "Transposed, a square target is as long as before, and in the same memory"
    y = torch.randint(0, C, (32, 8))
    class Transposes(Callback):
        order,run_valid = 5,False
        def before_batch(self): self.learn.yb = (self.learn.yb[0].T,)
    model = nn.Sequential(nn.Linear(6, C*8), nn.Unflatten(1, (C,8)))
    learn = mk_learn(mk_dls([torch.randn(32, 6)], [y]), model, nn.CrossEntropyLoss(), cbs=[MixUp(1.), Transposes()])
    with pytest.raises(RuntimeError, match='changed the targets'): quiet_fit(learn)

def test_what_belongs_to_classes_may_be_a_keyword():
    "As many classes as samples do not make it belong to them"
    def focal(p, y, alpha=None, reduction='mean'): return F.cross_entropy(p, y, alpha, reduction=reduction)
    pred,y = torch.randn(C, C), torch.arange(C)
    plan = BlendPlan(torch.tensor([.7]), y.roll(1))
    close(MixLoss(focal)(pred, y, alpha=w, plan=plan), .7*F.cross_entropy(pred, y, w) + .3*F.cross_entropy(pred, y.roll(1), w))

def test_classes_that_come_as_floats():
    def classes_as_floats(p, y, reduction='mean'): return F.cross_entropy(p, y.long(), reduction=reduction)
    dls = mk_dls([torch.randn(32, 6)], [torch.randint(0, C, (32,)).float()])
    for b in fit(classes_as_floats, dls, cb=MixUp(1., y_int=True)): close(b['loss'], mean_of(ce(), b['plan'], b['pred'].detach(), b['yb'][0].long()))

def test_a_missing_number_beside_classes():
    "NaN is no change of the targets"
    def masked(p, y, v, reduction='mean'):
        u = F.cross_entropy(p, y, reduction='none') + (p[:,0]-v.nan_to_num())**2*v.isfinite()
        return u if reduction=='none' else u.mean()
    class Copies(Callback):
        order,run_valid = 5,False
        def before_batch(self): self.learn.yb = tuple(o.clone() for o in self.learn.yb)
    v = torch.randn(32).where(torch.arange(32)%3>0, torch.nan)
    dls = mk_dls([torch.randn(32, 6)], [torch.arange(32)%C, v])
    quiet_fit(mk_learn(dls, loss_func=masked, cbs=[MixUp(1.), Copies()]))
