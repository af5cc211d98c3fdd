"Every loss, exactly: the mixed losses of real fits and of loops against the definition, written out by hand and in double precision"
import functools, pickle, weakref
from copy import deepcopy
from functools import partial
import pytest, torch, torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, DiceLoss, FocalLossFlat, L1LossFlat, LabelSmoothingCrossEntropy
from fastai.losses import LabelSmoothingCrossEntropyFlat, MSELossFlat
from fastai.metrics import accuracy
from fastai.torch_core import TensorBase, TensorCategory
from fastmix.lab.bench import count_ops, loss_steps
from fastmix.losses import ClassBCELoss, MixLoss, MultiLoss, soft_targets
from fastmix.mixers import CutMix, MixUp, OneOf
from fastmix.plan import Plan
from helpers import class_dls, mk_dls, mk_learn, name_of, quiet_fit, Record

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

def parts(plan):
    "For each sample, the weights and rows of its mixture"
    return [list(zip(ws, js)) for ws,js in zip(plan.weights.expand(plan.pairs.shape).double().tolist(), plan.pairs.tolist())]

def mean_of(u, plan, pred, y, reduction='mean'):
    "The definition, one sample, one position and one target at a time"
    num = den = 0.
    for p,part in zip(pred, parts(plan)):
        for weight,j in part:
            for p_,t_ in zip(p.reshape(-1, pred.shape[-1]), y[j].reshape(-1)):
                val,n = u(p_, t_)
                num,den = num+weight*val, den+weight*n
    return num/den if reduction=='mean' else num

def blended(plan, y): return torch.stack([sum(weight*y[j].double() for weight,j in part) for part in parts(plan)])
def close(a, b, **kwargs): assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), **(dict(rtol=2e-6, atol=1e-6) | kwargs))
def draw(bs=8, **kwargs): return MixUp(1., **kwargs).draw(torch.rand(bs, 1))
def batch(bs=8): return torch.randn(bs, C),torch.arange(bs)%C,draw(bs)

def fit(loss_func, dls=None, model=None, cb=None):
    learn = mk_learn(dls or class_dls(), model, loss_func, cbs=[cb or MixUp(1.), Record()])
    batches = quiet_fit(learn).record.batches
    assert learn.loss_func is loss_func and batches
    return batches

CE,FL,LS = CrossEntropyLossFlat,FocalLossFlat,LabelSmoothingCrossEntropyFlat
class_losses = [(CE(), ce()), (CE(weight=w, ignore_index=1), ce(w, ignore=1)), (CE(weight=w, reduction='sum'), ce(w)),
    (LS(eps=.3, reduction='sum'), ce(smooth=.3)), (LabelSmoothingCrossEntropy(), ce(smooth=.1)), (FL(weight=w), ce(w, gamma=2.)),
    (FL(gamma=1., reduction='sum'), ce(gamma=1.)), (F.cross_entropy, ce())]
class_losses += [(nn.CrossEntropyLoss(w, label_smoothing=.2, ignore_index=3), ce(w, .2, ignore=3))]
class_losses += [(partial(F.cross_entropy, ignore_index=1, weight=w), ce(w, ignore=1)),
    (partial(F.cross_entropy, reduction='sum', label_smoothing=.1), ce(smooth=.1))]

def reduction_of(f): return getattr(f, 'reduction', getattr(f, 'keywords', {}).get('reduction', 'mean'))

@pytest.mark.parametrize('loss_func,u', class_losses, ids=name_of)
def test_classes(loss_func, u):
    for b in fit(loss_func): close(b['loss'], mean_of(u, b['plan'], b['pred'].detach(), b['yb'][0], reduction_of(loss_func)))

@pytest.mark.parametrize('options', [dict(per_batch=True), dict(k=3), dict(k=3, per_batch=True)], ids=name_of)
def test_one_lam_and_three_samples(options):
    "The normaliser is mixed with one λ too"
    pred,y,_ = batch()
    plan = draw(**options)
    for f,u in class_losses: close(MixLoss(f)(pred, y, plan=plan), mean_of(u, plan, pred, y, reduction_of(f)))
    close(MixLoss(nn.MSELoss())(pred, pred.flip(0), plan=plan), F.mse_loss(pred.double(), blended(plan, pred.flip(0))))

def test_partners_that_are_no_permutation():
    pred,y,_ = batch()
    plan = Plan.of(torch.tensor([3]*8), torch.rand(8))
    close(MixLoss(nn.CrossEntropyLoss(w))(pred, y, plan=plan), mean_of(ce(w), plan, pred, y))

def even(p, y): return -logp(p.double()).mean(), 1.

@pytest.mark.parametrize('weight', [None,w], ids=['plain','weighted'])
def test_fastais_smoothing_has_two_normalisers(weight):
    "It leaves ignored targets out of one term only"
    y = torch.randint(0, C, (32,)).where(torch.arange(32)%3>0, -100)
    for b in fit(LS(weight=weight), mk_dls([torch.randn(32, 6)], [y])):
        args = b['plan'], b['pred'].detach(), b['yb'][0]
        close(b['loss'], .9*mean_of(ce(weight), *args) + .1*mean_of(even, *args))

def test_lam_one_is_the_plain_loss():
    pred,y,_ = batch()
    plan = Plan.of(torch.randperm(8), torch.ones(8))
    for f in (*(f for f,_ in class_losses), LS(weight=w)): close(MixLoss(f)(pred, y, plan=plan), f(pred, y))

def test_nll():
    for b in fit(nn.NLLLoss(w), model=nn.Sequential(nn.Linear(6, C), nn.LogSoftmax(1))):
        close(b['loss'], mean_of(ce(w), b['plan'], b['pred'].detach(), b['yb'][0]))

def bce(p, y, pw=1.): return -(pw*y*p.sigmoid().log() + (1-y)*(1-p.sigmoid()).log())

@pytest.mark.parametrize('loss_func,pw,dtype', [(BCEWithLogitsLossFlat(), 1., torch.float), (BCEWithLogitsLossFlat(), 1., torch.bool),
    (BCEWithLogitsLossFlat(pos_weight=w), w, torch.long), (nn.BCEWithLogitsLoss(pos_weight=w), w, torch.float),
    (F.binary_cross_entropy_with_logits, 1., torch.float)], ids=name_of)
def test_several_labels(loss_func, pw, dtype):
    ys = torch.randint(0, 2, (32, C)).to(dtype)
    for b in fit(loss_func, mk_dls([torch.randn(32, 6)], [ys])):
        close(b['loss'], bce(b['pred'].detach().double(), blended(b['plan'], b['yb'][0]), pw).mean())

@pytest.mark.parametrize('loss_func,f,shape', [(MSELossFlat(), torch.square, (32,)), (L1LossFlat(), torch.abs, (32,1)),
    (F.mse_loss, torch.square, (32,)), (nn.L1Loss(reduction='sum'), torch.abs, (32,1))], ids=name_of)
def test_regression(loss_func, f, shape):
    "Targets are blended"
    model = nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)) if len(shape)==1 else nn.Linear(6, 1)
    for b in fit(loss_func, mk_dls([torch.randn(32, 6)], [torch.randn(shape)]), model):
        err = f(b['pred'].detach().double() - blended(b['plan'], b['yb'][0]))
        close(b['loss'], err.sum() if reduction_of(loss_func)=='sum' else err.mean())

# Segmentation: void pixels are class 3

def seg_dls(): return mk_dls([torch.randn(16, 3, 6, 5)], [torch.randint(0, C, (16, 6, 5))])
def seg_model(): return nn.Conv2d(3, C, 1)

@pytest.mark.parametrize('kw', [{}, dict(weight=w, ignore_index=3), dict(weight=w, reduction='sum')], ids=name_of)
def test_segmentation(kw):
    u = ce(kw.get('weight'), ignore=kw.get('ignore_index', -100))
    for b in fit(CE(axis=1, **kw), seg_dls(), seg_model()):
        close(b['loss'], mean_of(u, b['plan'], b['pred'].detach().permute(0,2,3,1), b['yb'][0], kw.get('reduction', 'mean')))

def cut_mask(b):
    "The mask, cut where the pixels of the image are the partner's"
    x,x1,y = b['xb'][0], b['xb'][0][b['plan'].idx], b['yb'][0].clone()
    pasted = (b['mixed'][0] != x).any(1)
    assert b['mixed'][0].movedim(1,-1)[pasted].equal(x1.movedim(1,-1)[pasted]) and pasted.any()
    y[pasted] = b['yb'][0][b['plan'].idx][pasted]
    return y

def test_a_cut_mask_takes_the_plain_loss():
    loss_func = CE(axis=1, weight=w, ignore_index=3)
    for b in fit(loss_func, seg_dls(), seg_model(), CutMix()): close(b['loss'], loss_func(b['pred'], cut_mask(b)))

def dice(p, t):
    "Dice of one image, summed over classes"
    p = p.softmax(0)
    return sum(1 - (2*(p[c]*(t==c)).sum()+1e-6)/((p[c]+(t==c)).sum()+1e-6) for c in range(C))

@pytest.mark.parametrize('reduction', ['sum', 'mean'])
def test_dice_is_mixed_per_image(reduction):
    for b in fit(DiceLoss(reduction=reduction), seg_dls(), seg_model()):
        p,y = b['pred'].detach().double(), b['yb'][0]
        want = sum(weight*dice(p[i], y[j]) for i,part in enumerate(parts(b['plan'])) for weight,j in part)
        close(b['loss'], want/(len(y)*C) if reduction=='mean' else want)

dense = [(CE(axis=1, weight=w, ignore_index=2), ce(w, ignore=2)), (LS(axis=1), ce(smooth=.1))]
dense += [(nn.CrossEntropyLoss(w, label_smoothing=.2, ignore_index=3), ce(w, .2, ignore=3))]
dense += [(nn.NLLLoss(w), lambda p,y: (-p[y].double()*w[y], w[y].item()))]

@pytest.mark.parametrize('loss_func,u', dense, ids=name_of)
def test_dense_classes(loss_func, u):
    "Classes in dimension 1; masks with and without a channel where fastai flattens them; unreduced values in the plain order"
    pred,y,plan = torch.randn(3, C, 4, 5), torch.randint(0, C, (3, 4, 5)), draw(3)
    loss,ones = MixLoss(loss_func),Plan.of(plan.idx, torch.ones(3))
    for reduction in ('mean','sum','none'):
        loss.reduction = reduction
        if reduction=='none':
            assert loss(pred, y, plan=ones).shape==loss_func(pred, y).shape
            close(loss(pred, y, plan=ones), loss_func(pred, y))
            continue
        for o in (y,y[:,None]) if hasattr(loss_func, 'axis') else (y,):
            close(loss(pred, o, plan=plan), mean_of(u, plan, pred.movedim(1, -1), y, reduction))
    loss.reduction = 'mean'

# Losses of one's own

def no_reduction(p, y): return F.cross_entropy(p, y, weight=w)**2

def test_a_loss_without_reduction_takes_one_lam_and_says_so_once():
    with pytest.warns(UserWarning, match='no_reduction') as said: batches = fit(no_reduction)
    assert len([o for o in said if 'one λ for each batch' in str(o.message)]) == 1
    for b in batches:
        (lam,),y = b['plan'].lam,b['yb'][0]
        close(b['loss'], lam*no_reduction(b['pred'], y) + (1-lam)*no_reduction(b['pred'], y[b['plan'].idx]))
    pred,y,plan = batch()
    with pytest.raises(ValueError, match='no_reduction.*no `reduction` to leave out.*per_batch=True'):
        MixLoss(no_reduction)(pred, y, plan=plan)

class CeAndDice:
    def __init__(self): self.ce,self.dice = CE(axis=1, weight=w), DiceLoss()
    def __call__(self, p, y): return self.ce(p, y) + self.dice(p, y)
    def activation(self, p): return p.softmax(1)

def test_ce_and_dice():
    loss_func = CeAndDice()
    for cb in MixUp(1.), CutMix(1.):
        with pytest.warns(UserWarning, match='CeAndDice'): batches = fit(loss_func, seg_dls(), seg_model(), cb)
        for b in batches:
            (lam,),y = b['plan'].lam,b['yb'][0]
            if isinstance(cb, CutMix): close(b['loss'], loss_func(b['pred'], cut_mask(b)))
            else: close(b['loss'], lam*loss_func(b['pred'], y) + (1-lam)*loss_func(b['pred'], y[b['plan'].idx]))

def own_mean(p, y, reduction='mean'):
    u = F.cross_entropy(p, y, reduction='none')
    return u if reduction=='none' else u.sum()/(y+1).sum()

def two_heads(p, y, reduction='mean'):
    "The unreduced losses are not one per sample, in order"
    u = torch.cat([F.cross_entropy(o, y, reduction='none') for o in (p, 2*p)])
    return u.mean() if reduction=='mean' else u

class HalfIgnored(nn.CrossEntropyLoss):
    "A few void targets, which no attribute declares"
    def forward(self, p, y): return F.cross_entropy(p, y.where(y!=3, -100), reduction=self.reduction)

@pytest.mark.filterwarnings('ignore:size_average')
@pytest.mark.parametrize('loss_func', [own_mean, two_heads, HalfIgnored(), CE(weight=w, flatten=False),
    partial(F.cross_entropy, size_average=False)], ids=name_of)
def test_a_mean_that_is_none_is_refused(loss_func):
    with pytest.raises(ValueError, match='per_batch=True'): fit(loss_func)
    assert fit(loss_func, cb=MixUp(1., per_batch=True))

def test_a_check_is_close_in_half_precision_and_can_be_left_out():
    pred,y,plan = torch.randn(64, C).bfloat16(), torch.tensor([3]*3 + [0,1,2]*20 + [1]), draw(64)
    with pytest.raises(ValueError, match='cannot be mixed sample by sample'): MixLoss(HalfIgnored())(pred, y, plan=plan)
    assert MixLoss(HalfIgnored(), check=False)(pred, y, plan=plan).isfinite()

def test_a_weighted_mean_is_not_the_mean_of_weighted_losses():
    "PyTorch's regression losses divide by the sum of the weights"
    pred,y = torch.randn(8, 2), torch.randn(8, 2)
    with pytest.raises(ValueError, match='a further target'): MixLoss(partial(F.mse_loss, weight=torch.rand(8, 2)))(pred, y, plan=draw())

def wrapped(passes_on):
    def narrow(pred, y): return 2*F.cross_entropy(pred, y)
    def wide(*args, **kwargs): return 2*F.cross_entropy(*args, **kwargs)
    return functools.wraps(F.cross_entropy)(wide if passes_on else narrow)

def test_a_loss_that_wraps_another_has_its_own_arguments():
    "And those of the other loss, if it passes keywords to it"
    for b in fit(wrapped(True)): close(b['loss'], 2*mean_of(ce(), b['plan'], b['pred'].detach(), b['yb'][0]))
    with pytest.warns(UserWarning, match='one λ for each batch'): batches = fit(wrapped(False))
    for b in batches: close(b['loss'], 2*mean_of(ce(), b['plan'], b['pred'].detach(), b['yb'][0]))

class Aux(nn.Module):
    "A head and an auxiliary head"
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(6, C), nn.Linear(6, C)
    def forward(self, x): return self.a(x), self.b(x)

def aux_loss(p, y, reduction='mean'):
    return F.cross_entropy(p[0], y, reduction=reduction) + .4*F.cross_entropy(p[1], y, reduction=reduction)

def test_auxiliary_head():
    for b in fit(aux_loss, model=Aux()):
        args = [(b['plan'], p.detach(), b['yb'][0]) for p in b['pred']]
        close(b['loss'], mean_of(ce(), *args[0]) + .4*mean_of(ce(), *args[1]))

# Losses or targets?

def both_ways(b):
    "The mean absolute error, losses mixed and targets blended"
    p,y,plan = b['pred'].detach().double(),b['yb'][0].double(),b['plan']
    mixed = sum(weight*(p[i]-y[j]).abs().mean() for i,part in enumerate(parts(plan)) for weight,j in part)/len(p)
    return mixed,(p-blended(plan, y)).abs().mean()

class MyL1(nn.L1Loss): pass
class Mixes(nn.L1Loss): y_int = True
class Blends(nn.L1Loss): y_int = False

@pytest.mark.parametrize('loss_func,y_int,mixes', [(F.l1_loss,None,False), (F.l1_loss,True,True), (F.l1_loss,False,False),
    (MyL1(),None,True), (MyL1(),False,False), (Mixes(),None,True), (Mixes(),False,False), (Blends(),None,False)], ids=name_of)
def test_losses_or_targets(loss_func, y_int, mixes):
    "The user decides first, and then the loss. PyTorch's losses of numbers blend them, others do not. L1 of a blend is not the blend of L1s"
    for b in fit(loss_func, mk_dls([torch.randn(32, 6)], [torch.randn(32,1)]), nn.Linear(6, 1), MixUp(1., y_int=y_int)):
        close(b['loss'], both_ways(b)[0 if mixes else 1])

@pytest.mark.parametrize('loss_func,mixes', [(nn.L1Loss(),False), (Blends(),False)], ids=name_of)
def test_integers_are_mixed_unless_the_loss_is_of_numbers(loss_func, mixes):
    dls = mk_dls([torch.randn(32, 6)], [torch.randint(0, 9, (32,1))])
    for b in fit(loss_func, dls, nn.Linear(6, 1)): close(b['loss'], both_ways(b)[0 if mixes else 1])

def test_unknown_labels_are_not_averaged():
    "Where -1, or NaN, means that a label is missing"
    def masked(p, y, reduction='mean'):
        u = (F.binary_cross_entropy_with_logits(p, y.nan_to_num(-1).clamp_min(0), reduction='none') * (y.nan_to_num(-1)>=0)).mean(1)
        return u if reduction=='none' else u.mean()
    for missing in (-1., torch.nan):
        y = torch.randint(0, 2, (32, C)).float()
        y[::3,1:3] = missing
        for b in fit(masked, mk_dls([torch.randn(32, 6)], [y])):
            u = [masked(b['pred'].detach(), b['yb'][0][i], 'none') for i in b['plan'].pairs.T]
            close(b['loss'], (b['plan'].lam*u[0] + (1-b['plan'].lam)*u[1]).mean())

@pytest.mark.parametrize('f', [nn.HingeEmbeddingLoss(), F.soft_margin_loss], ids=name_of)
def test_signs_are_classes(f):
    for b in fit(f, mk_dls([torch.randn(32, 6)], [torch.randn(32).sign()]), nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))):
        pure = F.soft_margin_loss if f is F.soft_margin_loss else F.hinge_embedding_loss
        u = [pure(b['pred'].detach(), b['yb'][0][i], reduction='none') for i in b['plan'].pairs.T]
        close(b['loss'], (b['plan'].lam*u[0] + (1-b['plan'].lam)*u[1]).mean())

def test_classes_that_come_as_floats():
    def classes_as_floats(p, y, reduction='mean'): return F.cross_entropy(p, y.long(), reduction=reduction)
    dls = mk_dls([torch.randn(32, 6)], [torch.randint(0, C, (32,)).float()])
    for b in fit(classes_as_floats, dls): close(b['loss'], mean_of(ce(), b['plan'], b['pred'].detach(), b['yb'][0].long()))

def test_probabilities():
    "Cross-entropy is linear in its target, so mixing the losses equals mixing the targets"
    ys = torch.rand(32, C).softmax(1)
    for loss_func in nn.CrossEntropyLoss(w), CE(flatten=False, weight=w):
        for b in fit(loss_func, mk_dls([torch.randn(32, 6)], [ys])):
            close(b['loss'], -(blended(b['plan'], b['yb'][0])*w*logp(b['pred'].detach())).sum(1).mean())

def test_classes_are_not_blended_as_numbers():
    pred,y,plan = batch()
    with pytest.raises(ValueError, match='y_int=False would blend classes'): MixLoss(nn.CrossEntropyLoss(), y_int=False)(pred, y, plan=plan)

# Several targets

def two_targets(p, y, t, reduction='mean'):
    u = F.cross_entropy(p[:,:C], y, reduction='none') + F.mse_loss(p[:,C], t.nan_to_num(), reduction='none')*t.isfinite()
    return u.mean() if reduction=='mean' else u

def test_class_and_number_in_one_loss():
    "Some of the numbers are missing"
    dls = mk_dls([torch.randn(32, 6)], [torch.randint(0, C, (32,)), torch.randn(32).where(torch.arange(32)%3>0, torch.nan)])
    for b in fit(two_targets, dls, nn.Linear(6, C+1)):
        u = [two_targets(b['pred'].detach(), *(o[i] for o in b['yb']), 'none') for i in b['plan'].pairs.T]
        close(b['loss'], (b['plan'].lam*u[0] + (1-b['plan'].lam)*u[1]).mean())

def weighed(p, y, w, reduction='mean'):
    "Each class counts by a weight of its own, as in the weight maps of a U-Net"
    u = F.cross_entropy(p, y, reduction='none')*w
    return u if reduction=='none' else u.mean()

@pytest.mark.parametrize('shape,per_batch', [((),False), ((5,),False), ((5,),True)], ids=name_of)
def test_classes_and_their_weights(shape, per_batch):
    "A weight stays with its class: labels with weight 0 have no effect"
    y = torch.randint(0, C, (32,*shape))
    dls = mk_dls([torch.randn(32, 6)], [y, (y!=2).float()*torch.rand(y.shape)])
    model = nn.Sequential(nn.Linear(6, C*5), nn.Unflatten(1, (C,5))) if shape else nn.Linear(6, C)
    for b in fit(weighed, dls, model, MixUp(1., per_batch=per_batch)):
        u = [weighed(b['pred'].detach(), *(o[i] for o in b['yb']), 'none').reshape(8, -1).mean(1) for i in b['plan'].pairs.T]
        close(b['loss'], (b['plan'].lam*u[0] + (1-b['plan'].lam)*u[1]).mean())

def test_keywords():
    "What belongs to the samples is refused while they are mixed; what belongs to the classes is not, even where there are as many classes as samples"
    pred,y,plan = batch()
    with pytest.raises(ValueError, match='w, of shape .8,., seems to belong to the samples'):
        MixLoss(weighed)(pred, y, w=torch.rand(8), plan=plan)
    close(MixLoss(F.cross_entropy)(pred, y, weight=w, plan=plan), mean_of(ce(w), plan, pred, y))
    close(MixLoss(F.cross_entropy)(input=pred, target=y, plan=plan), mean_of(ce(), plan, pred, y))
    close(MixLoss(weighed)(pred, y, w=torch.ones(8)), F.cross_entropy(pred, y))
    pred,y,plan = batch(C)
    close(MixLoss(F.cross_entropy)(pred, y, weight=w, plan=plan), mean_of(ce(w), plan, pred, y))

def test_a_loss_for_each_target():
    loss_func = MultiLoss(CE(), MSELossFlat(), weights=[1,.1])
    class Two(Aux):
        def forward(self, x): return self.a(x), self.b(x)[:,:1]
    for b in fit(loss_func, mk_dls([torch.randn(32, 6)], [torch.randint(0, C, (32,)), torch.randn(32, 1)]), Two()):
        (p,q),(y,t) = (o.detach() for o in b['pred']),b['yb']
        close(b['loss'], mean_of(ce(), b['plan'], p, y) + .1*(q.double()-blended(b['plan'], t)).square().mean())
    for f,want in ((loss_func.activation, p.softmax(1)), (loss_func.decodes, p.argmax(1))): assert f((p,q))[0].equal(want) and f((p,q))[1].equal(q)
    loss_func.reduction = 'none'
    close(loss_func((p,q), y, t), F.cross_entropy(p, y, reduction='none') + .1*(q-t).square()[:,0])

def test_a_loss_for_each_target_needs_as_many():
    pred,y,plan = batch()
    with pytest.raises(ValueError, match='weights must hold a number for each of the 2 losses.*3'): MultiLoss(CE(), CE(), weights=[3])
    with pytest.raises(ValueError, match='has 2 losses.*called with 2 and 1'): MultiLoss(CE(), CE())((pred,pred), y)
    with pytest.raises(ValueError, match='2 losses, but there are 1 targets'): MixLoss(MultiLoss(CE(), CE()))((pred,pred), y, plan=plan)

# Numbers

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=name_of)
def test_half_precision_losses_are_mixed_in_single(dtype):
    pred,y,plan = torch.randn(64, C).to(dtype), torch.arange(64)%C, draw(64)
    u,u1 = (F.cross_entropy(pred, o, reduction='none').double() for o in (y,y[plan.idx]))
    got = MixLoss(nn.CrossEntropyLoss())(pred, y, plan=plan)
    assert got.dtype==torch.float32
    close(got, (plan.lam*u + (1-plan.lam)*u1).mean())

@pytest.mark.parametrize('dtype', [torch.uint8, torch.int8, torch.int32], ids=name_of)
def test_small_integers(dtype):
    "Class 156 is not -100, wrapped around"
    n = 100 if dtype==torch.int8 else 157
    pred,y,plan,loss_func = torch.randn(8, n), torch.full((8,), n-1), draw(), CE(weight=torch.rand(n))
    close(MixLoss(loss_func)(pred, y.to(dtype), plan=plan), MixLoss(loss_func)(pred, y, plan=plan))

def test_fastais_own_tensor_classes_in_a_plain_loop():
    pred,y,plan = batch()
    for f in CE(weight=w), nn.CrossEntropyLoss(w, ignore_index=2), nn.MultiMarginLoss():
        close(MixLoss(f)(TensorBase(pred), TensorCategory(y), plan=plan), MixLoss(f)(pred, y, plan=plan))

@pytest.mark.parametrize('loss_func', [CE(), F.cross_entropy, LS()], ids=name_of)
@pytest.mark.parametrize('y', [torch.arange(4)%C, torch.arange(16).view(8, 2)%C, torch.full((8,), C), torch.full((8,), -1)],
    ids=['short', 'long', 'above', 'below'])
def test_targets_that_do_not_fit_are_errors(loss_func, y):
    with pytest.raises((ValueError, RuntimeError, IndexError)): MixLoss(loss_func)(torch.randn(8, C), y, plan=draw(len(y)))

def test_a_class_that_is_masked_out():
    "An ignored target adds 0, and not 0 times the infinite loss of some class"
    pred,y,plan = torch.randn(4, C), torch.tensor([1,2,-100,3]), draw(4)
    pred[:,0] = -1e4
    close(MixLoss(nn.CrossEntropyLoss())(pred.where(pred>-1e4, -torch.inf), y, plan=plan), mean_of(ce(), plan, pred, y))

def test_an_ignored_row_may_hold_anything():
    "Also with label smoothing, as in PyTorch"
    pred,y,plan = torch.randn(4, C), torch.tensor([1,2,-100,-100]), Plan.of(torch.tensor([1,0,3,2]), torch.tensor([.9,.8,.7,.6]))
    want = mean_of(ce(smooth=.1), plan, pred, y)
    pred[2:] = torch.tensor([torch.inf,-torch.inf,torch.nan,0.])
    close(MixLoss(nn.CrossEntropyLoss(label_smoothing=.1))(pred, y, plan=plan), want)

def test_an_unknown_reduction_is_the_losses_own_error():
    pred,y,plan = batch()
    with pytest.raises(ValueError, match='avg'): MixLoss(nn.CrossEntropyLoss(reduction='avg'))(pred, y, plan=plan)

def test_gradients():
    "Of mixed cross-entropy: those of cross-entropy with the mixed one-hot target; and those of the definition, twice"
    pred,y,plan = torch.randn(6, C, dtype=torch.float64, requires_grad=True), torch.arange(6)%C, draw(6)
    g, = torch.autograd.grad(MixLoss(CE())(pred, y, plan=plan), pred)
    close(g, (pred.softmax(1) - blended(plan, torch.eye(C)[y]))/6)
    loss = MixLoss(nn.CrossEntropyLoss(w.double(), label_smoothing=.1))
    assert torch.autograd.gradcheck(lambda p: loss(p, y, plan=plan), pred)
    assert torch.autograd.gradgradcheck(lambda p: loss(p, y, plan=plan), pred)

@pytest.mark.parametrize('shape', [(8,21,64,64), (64,5_000)], ids=name_of)
def test_a_mixed_loss_takes_the_memory_of_a_plain_one(shape):
    "Its peak is within 15 %; in total, it is much less than that of two losses"
    plain,two,ours = (count_ops(loss_steps(shape)[o]) for o in ('plain','two losses','fastmix'))
    assert ours['fresh MB'] < .7*two['fresh MB']
    assert ours['peak MB'] < 1.15*plain['peak MB'] < .9*two['peak MB']

# A loss in place of another

def test_a_loop_is_mixed_only_where_it_says_so():
    "And neither a failed call nor a good one leaves anything behind"
    pred,y,plan = batch()
    loss = MixLoss(nn.CrossEntropyLoss())
    with pytest.raises(ValueError): loss(pred[:4], y, plan=plan)
    loss(pred, y, plan=plan)
    assert loss(pred, y).equal(F.cross_entropy(pred, y)) and not loss.calls and not loss.is_for((y,))

def test_validation_holds_no_targets():
    loss,y = MixLoss(nn.MSELoss()),torch.rand(4)
    ref = weakref.ref(y)
    loss(torch.rand(4), y)
    del y
    assert ref() is None

@pytest.mark.parametrize('own', [CE(weight=w), F.cross_entropy, partial(F.cross_entropy, weight=w)], ids=name_of)
def test_a_loss_of_one_batch(own):
    "It mixes for the very targets it was made for; it answers, pickles and is copied as the user's own"
    pred,y,plan = batch()
    loss = MixLoss(own, plan, (y,))
    mixed,kept = loss(pred, *loss.yb),{k:v for k,v in vars(loss).items() if k!='calls'}
    close(mixed, mean_of(ce(None if own is F.cross_entropy else w), plan, pred, y))
    assert loss(pred, y.clone())==own(pred, y)!=mixed and loss(pred, *loss.yb)==mixed
    assert [loss.is_for(o) for o in loss.calls]==[True,False,True] and kept=={k:v for k,v in vars(loss).items() if k!='calls'}
    for copied in pickle.loads(pickle.dumps(loss)),deepcopy(loss): assert type(copied) is type(own) and copied(pred, y)==own(pred, y)

def test_targets_that_are_partners_only():
    "They come after the batch's targets, and the loss is called with the batch's"
    pred,y = torch.randn(8, C), torch.arange(12)%C
    plan = MixUp(1.).draw(torch.rand(12, 1), bs=8)
    loss = MixLoss(CE(), plan, (y,))
    assert loss.yb[0].equal(y[:8])
    close(loss(pred, *loss.yb), mean_of(ce(), plan, pred, y))

def test_attributes_are_the_users():
    own = CE(weight=w)
    for loss in MixLoss(own), MixLoss(own, draw(), (torch.arange(8)%C,)):
        loss.reduction,loss.note = 'sum','mine'
        assert own.reduction=='sum' and own.note=='mine' and loss.y_int and loss.axis==-1
        assert loss.activation(torch.eye(C)).equal(torch.eye(C).softmax(1)) and str(loss)==f'MixLoss({own})'
    assert not hasattr(MixLoss(no_reduction), 'reduction')

@pytest.mark.parametrize('make,name', [(lambda: CE(weight=w.clone()), 'inner.0.weight'), 
    (lambda: nn.CrossEntropyLoss(w.clone()), 'loss_func.weight')], ids=['fastai','torch'])
def test_a_loss_moves_with_its_model(make, name):
    "Also what is in fastai's losses, which are no modules; a copy is a `MixLoss` of its own"
    (pred,y,plan),model = batch(),nn.Module()
    model.loss = MixLoss(own := make())
    copied = pickle.loads(pickle.dumps(deepcopy(model))).loss
    copied.load_state_dict({name: torch.ones(C)})
    for loss,weight in ((model.loss,w), (copied,torch.ones(C))):
        close(loss(pred, y, plan=plan), mean_of(ce(weight), plan, pred, y))
        close(loss(pred, y), F.cross_entropy(pred, y, weight))
    assert own(pred, y)==model.loss(pred, y) and list(model.state_dict())==[f'loss.{name}']
    assert model.double().loss(pred.double(), y, plan=plan).dtype==torch.float64
    assert [o.device.type for o in model.to('meta').buffers()]==['meta']

def test_several_losses_move_with_their_model():
    loss,plan = MixLoss(MultiLoss(CE(weight=w.clone()), F.l1_loss)).double(),draw()
    pred,y,t = torch.randn(8, C).double(),torch.arange(8)%C,torch.randn(8).double()
    close(loss((pred,pred[:,0]), y, t, plan=plan), mean_of(ce(w.double()), plan, pred, y) + (pred[:,0]-blended(plan, t)).abs().mean())

compiled = [nn.CrossEntropyLoss(), CE(weight=w, axis=1), LS(), partial(F.cross_entropy, label_smoothing=.1), nn.BCEWithLogitsLoss()]

@pytest.mark.parametrize('loss_func,mixer', [*((f, MixUp(.4)) for f in compiled), (F.cross_entropy, MixUp(.4, per_batch=True)),
    (nn.CrossEntropyLoss(), CutMix())], ids=name_of)
def test_a_compiled_step_is_one_graph(loss_func, mixer):
    "For all batches, with nothing left outside of it, also after the loss was moved"
    x,model,graphs = torch.rand(8, 3, 6, 6), nn.Sequential(nn.Flatten(), nn.Linear(108, C)), []
    y,loss = torch.rand(8, C) if isinstance(loss_func, nn.BCEWithLogitsLoss) else torch.arange(8)%C, MixLoss(loss_func).to('cpu')
    def step(x, y, plan): return loss(model(plan.mix(x)), y, plan=plan)
    def backend(graph, inputs): return graphs.append(graph) or graph.forward
    torch.compiler.reset()
    fast = torch.compile(step, fullgraph=True, backend=backend)
    for plan in [mixer.draw(x) for _ in range(4)]:
        close(fast(x, y, plan).detach(), step(x, y, plan).detach())
        close(*(torch.autograd.grad(f(x, y, plan), model[1].weight)[0] for f in (fast, step)))
    assert len(graphs)==1

# Probabilities

def soft_by_hand(plan, y): return blended(plan, F.one_hot(y, C)).float()

@pytest.mark.parametrize('options', [dict(), dict(k=3), dict(per_batch=True)], ids=name_of)
def test_the_loss_on_probabilities(options):
    pred,y,plan = *batch(9)[:2],draw(9, **options)
    t = soft_by_hand(plan, y)
    close(soft_targets(plan, y, C), t)
    for f in F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=.1), ClassBCELoss(), ClassBCELoss(.1, thresh=.3):
        close(MixLoss(f, soft=True)(pred, y, plan=plan), f(pred, t))
    for f in CE(weight=w), nn.CrossEntropyLoss(w): close(MixLoss(f, soft=True)(pred, y, plan=plan), -(t*w*pred.log_softmax(1)).sum()/(t*w).sum())

def test_probabilities_of_pixels():
    pred,y = torch.randn(6, C, 5, 3), torch.randint(0, C, (6,5,3))
    plan = OneOf(MixUp(1.), CutMix(), None, per_batch=False).draw(torch.rand(6, 3, 5, 3))
    t = soft_targets(plan, y, C)
    assert t.shape==pred.shape and (t.sum(1)-1).abs().max() < 1e-6
    close(MixLoss(nn.CrossEntropyLoss(), soft=True)(pred, y, plan=plan), MixLoss(nn.CrossEntropyLoss())(pred, y, plan=plan))
    close(MixLoss(CE(axis=-1), soft=True)(pred.movedim(1, -1), y, plan=plan), F.cross_entropy(pred, t))
    assert not soft_targets(plan, torch.full_like(y, -100), C).any()

@pytest.mark.parametrize('f', [CE(), F.cross_entropy], ids=name_of)
def test_only_what_is_to_be_ignored_is(f):
    pred,y,plan = batch()
    want = soft_by_hand(plan, y)*(torch.arange(C)!=3)
    y[y==3] = -100
    close(MixLoss(f, soft=True)(pred, y, plan=plan), -(want*pred.log_softmax(1)).sum()/want.sum())   # of those that count

@pytest.mark.parametrize('f', [nn.NLLLoss(weight=w), LabelSmoothingCrossEntropy(), nn.CrossEntropyLoss(label_smoothing=.1), CE(weight=w, ignore_index=2)],
    ids=name_of)
def test_class_losses_need_no_probabilities(f):
    "They are linear in their target, so both ways are equal"
    pred,y,plan = batch()
    y[1] = -100 if isinstance(f, nn.CrossEntropyLoss) else y[1]
    close(MixLoss(f, soft=True)(pred, y, plan=plan), MixLoss(f)(pred, y, plan=plan))

def smooths_classes_only(p, y, reduction='mean'): return F.cross_entropy(p, y, label_smoothing=.1*(y.ndim==1), reduction=reduction)
def of_probabilities(p, y): return -(y*p.log_softmax(1)).sum(1).mean()

@pytest.mark.parametrize('f,what', [(nn.MultiMarginLoss(), 'does not take probabilities'), (smooths_classes_only, 'for the same classes as probabilities'),
    (of_probabilities, 'does not take classes'), (nn.BCEWithLogitsLoss(), 'does not take classes')], ids=name_of)
def test_a_loss_that_treats_probabilities_as_something_else(f, what):
    pred,y,plan = batch(6)
    with pytest.raises(ValueError, match=what): MixLoss(f, soft=True)(pred, y, plan=plan)
    learn = mk_learn(class_dls(), None, f, cbs=MixUp(1., soft=True))
    before = [o.clone() for o in learn.model.parameters()]
    with pytest.raises(ValueError, match=what): quiet_fit(learn)
    assert all(map(torch.equal, before, learn.model.parameters()))

def test_probabilities_are_for_one_target():
    pred,y,plan = batch()
    with pytest.raises(ValueError, match='soft=True is for one target, but .* takes 2'): MixLoss(nn.MultiMarginLoss(), soft=True)(pred, y, y, plan=plan)

def test_probabilities_are_blended_where_a_loss_gets_them():
    "Also for a loss of your own, since soft=True asks for it"
    pred,y,plan = *torch.rand(2, 8, C),draw()
    for f in nn.MSELoss(), ClassBCELoss(thresh=.5): close(MixLoss(f, soft=True)(pred, y, plan=plan), f(pred, blended(plan, y).float()))

@pytest.mark.parametrize('eps,shape', [(0.,(4,3)), (.1,())], ids=name_of)
def test_bce_by_hand(eps, shape):
    "As timm's: on = 1-ε+ε/C, off = ε/C; linear in the target, so that mixing losses and mixing targets agree"
    pred,y,plan,loss = torch.randn(6, C, *shape), torch.randint(0, C, (6,*shape)), draw(6, k=3), ClassBCELoss(eps)
    t = torch.full_like(pred, eps/C).scatter_(1, y[:,None], 1-eps+eps/C)
    close(loss(pred, y), -(t*F.logsigmoid(pred) + (1-t)*F.logsigmoid(-pred)).mean())
    want = loss(pred, blended(plan, F.one_hot(y, C).movedim(-1, 1)).float())
    for soft in (False,True): close(MixLoss(loss, soft=soft)(pred, y, plan=plan), want)

@pytest.mark.parametrize('thresh,soft', [(None,False), (.2,True)])
def test_bce_of_a_table(thresh, soft):
    "Whose targets have the shape (n, 1)"
    (pred,y,plan),loss = batch(),ClassBCELoss(thresh=thresh)
    close(loss(pred, y[:,None]), loss(pred, y))
    close(MixLoss(loss, soft=soft)(pred, y[:,None], plan=plan), MixLoss(loss, soft=soft)(pred, y, plan=plan))

def test_a_threshold_counts_both_as_present():
    pred,y,plan = batch()
    want = F.binary_cross_entropy_with_logits(pred, (soft_by_hand(plan, y)>.2).float())
    close(MixLoss(ClassBCELoss(thresh=.2), soft=True)(pred, y, plan=plan), want)

@pytest.mark.parametrize('eps', [-.1, 1.])
def test_bad_smoothing(eps):
    with pytest.raises(ValueError, match=f'label_smoothing must be at least 0 and below 1, but it is {eps}'): ClassBCELoss(eps)

@pytest.mark.parametrize('mixer', [MixUp(1.), MixUp(1., soft=True, until=.5)], ids=name_of)
def test_bce_in_a_learner(mixer):
    "Trained on mixtures, validated on classes by the same loss"
    learn = mk_learn(class_dls(), loss_func=(own := ClassBCELoss(.1)), cbs=[mixer, record := Record()], metrics=accuracy)
    quiet_fit(learn, 2)
    for b in record.batches: close(b['loss'], own(b['pred'].detach(), soft_by_hand(b['plan'], b['yb'][0])))
    assert learn.loss_func is own and len(learn.validate())==2
    preds,_,decoded = learn.get_preds(with_decoded=True)
    assert ((preds>0)&(preds<1)).all() and decoded.equal(preds.argmax(1))

@pytest.mark.parametrize('f', [F.cross_entropy, nn.CrossEntropyLoss(w), partial(F.nll_loss), LabelSmoothingCrossEntropyFlat()], ids=['ce','weighted','nll','smoothed'])
def test_autocast_computes_class_losses_in_single_precision(f):
    "As PyTorch's own"
    y,plan = torch.randint(0, C, (64,)),Plan.of(torch.arange(64).roll(1), torch.ones(1))
    p = (3*torch.randn(64, C)).log_softmax(1).bfloat16()
    with torch.autocast('cpu', torch.bfloat16): got = MixLoss(f)(p, y, plan=plan)
    close(got, f(p.float(), y))

# Targets of pairs
def test_values_of_pairs_of_samples_are_refused():
    y,plan = torch.arange(8)%3,draw()
    same = (y[:,None]==y).float()
    for target in same,same.long(),torch.eye(8):
        with pytest.raises(ValueError, match=r'shape \(8, 8\).* a value for each pair of samples'): MixLoss(F.mse_loss)(torch.rand(8, 8), target, plan=plan)
    with pytest.warns(UserWarning, match='is treated as 8 values of each sample'): MixLoss(F.mse_loss)(torch.rand(8, 8), torch.rand(8, 8), plan=plan)

# A plan that is forgotten
def test_training_without_a_plan_is_warned_of(recwarn):
    p,y,plan = batch()
    loss = MixLoss(nn.CrossEntropyLoss())
    loss(p, y)
    with torch.no_grad(): loss(p.requires_grad_(), y)
    loss(p, y, plan=None)
    loss(p, y, plan=plan)
    quiet_fit(mk_learn(class_dls(), cbs=MixUp(1.)))
    assert not [o for o in recwarn if 'plan' in str(o.message)]
    with pytest.warns(UserWarning, match=r'without a plan.*plan=plan'): loss(p, y)

def test_outputs_keep_their_class():
    "A loss reads `pred.logits` of what many libraries return"
    class Output(dict):
        def __init__(self, logits): super().__init__(logits=logits)
        @property
        def logits(self): return self['logits']
    def f(out, y, reduction='mean'): return F.cross_entropy(out.logits, y, reduction=reduction)
    p,y,plan = batch()
    close(MixLoss(f)(Output(p.half()), y, plan=plan), MixLoss(F.cross_entropy)(p.half(), y, plan=plan), rtol=1e-3)

# Losses that only look known
def tripled(m, args): return args[0]*3,args[1]

@pytest.mark.parametrize('make', [nn.CrossEntropyLoss, nn.MSELoss])
@pytest.mark.parametrize('change', [lambda f: f.register_forward_pre_hook(tripled), lambda f: f.register_forward_hook(lambda m,a,o: 3*o),
    lambda f: setattr(f, 'forward', lambda p,y: F.cross_entropy(3*p, y.long(), reduction=f.reduction))], ids=['pre-hook','hook','forward'])
def test_a_known_loss_that_was_changed_is_one_of_your_own(make, change):
    change(f := make())
    p,y,plan = batch()
    t = y if make is nn.CrossEntropyLoss or 'forward' in vars(f) else torch.rand(8, C)
    f.reduction = 'none'
    us = [f(p, o).reshape(8, -1).mean(1) for o in (t,t[plan.idx])]
    f.reduction = 'mean'
    close(MixLoss(f)(p, t.float() if 'forward' in vars(f) else t, plan=plan), (plan.lam*us[0] + (1-plan.lam)*us[1]).mean())

class Squared(MultiLoss):
    def forward(self, preds, *yb): return super().forward(preds, *yb)**2

def test_a_changed_multiloss_is_one_of_your_own():
    p,y,plan = batch()
    one = Plan.of(plan.idx, torch.tensor([.6]))
    z,preds = torch.randn(8, C),(p,2*p)
    hooked = MultiLoss(nn.CrossEntropyLoss(), nn.L1Loss())
    hooked.register_forward_hook(lambda m,a,o: 5*o)
    for f in Squared(nn.CrossEntropyLoss(), nn.L1Loss()),hooked:
        close(MixLoss(f)(preds, y, z, plan=one), .6*f(preds, y, z) + .4*f(preds, y[one.idx], z[one.idx]))
    plain = MultiLoss(nn.CrossEntropyLoss(), nn.L1Loss())
    close(MixLoss(torch.compile(plain, backend='eager'))(preds, y, z, plan=plan), want := MixLoss(plain)(preds, y, z, plan=plan))
    plain.reduction = 'none'
    each = MixLoss(plain)(preds, y, z, plan=plan)
    assert each.shape==(8,)
    close(each.mean(), want)

def test_complex_targets():
    p,y = torch.randn(2, 8, 3, dtype=torch.complex64)
    plan = draw()
    close(MixLoss(nn.L1Loss())(p, y, plan=plan), (p-(plan.lam[:,None]*y + (1-plan.lam[:,None])*y[plan.idx])).abs().mean())

@pytest.mark.parametrize('shape', [(8,8,1), (8,1,8)], ids=name_of)
def test_values_of_pairs_in_other_shapes(shape):
    y,plan = torch.arange(8)%3,draw()
    with pytest.raises(ValueError, match='each pair of samples'): MixLoss(F.mse_loss)(torch.rand(shape), (y[:,None]==y).float().view(shape), plan=plan)
    with pytest.warns(UserWarning, match='values of each sample'): MixLoss(F.binary_cross_entropy_with_logits)(torch.rand(8, 8), y[:,None]>y, plan=plan)

def test_codes_are_no_probabilities():
    "soft=True is for classes, (bs,), and for probabilities, (bs, c)"
    def f(p, y): return F.cross_entropy(p, y.long())
    p,y,_ = batch()
    plan = Plan.of(torch.arange(8).roll(1), torch.tensor([.7]))
    close(MixLoss(f, soft=True)(p, y.float(), plan=plan), .7*f(p, y) + .3*f(p, y[plan.idx]))

def test_soft_labels_that_come_from_elsewhere():
    p,y,plan = batch(6)
    loss = F.cross_entropy(p.requires_grad_(), y)
    with pytest.raises(ValueError, match='takes labels from elsewhere'): MixLoss(lambda p,y: loss, soft=True)(p, y, plan=plan)

def test_weights_of_samples_in_a_nest():
    def f(p, y, w=None, reduction='mean'): return F.cross_entropy(p, y, reduction=reduction)
    p,y,plan = batch(6)
    with pytest.raises(ValueError, match='w, of shape .6,., seems to belong to the samples'): MixLoss(f)(p, y, plan=plan, w=dict(a=torch.rand(6)))

def test_one_hot_labels_of_a_small_batch_are_no_pairs():
    y = F.one_hot(torch.tensor([1,0,3,2]), 4).float()
    plan = Plan.of(torch.tensor([1,2,3,0]), torch.tensor([.7]))
    for t in y,torch.eye(4): close(MixLoss(nn.BCEWithLogitsLoss())(torch.zeros(4, 4), t, plan=plan), torch.tensor(2.).log())

def test_targets_of_a_second_loader_changed_in_place():
    "The partners' targets are no part of those that the loss is called with"
    plan,targets,pred = Plan(torch.tensor([[0,2],[1,3]]), torch.tensor([[.7,.3],[.6,.4]]), n=4),torch.tensor([0,1,2,2]),torch.randn(2, 3)
    loss = MixLoss(nn.CrossEntropyLoss(), plan, (targets,))
    rows = F.cross_entropy(pred[:,None].expand(2, 2, 3).reshape(4, 3), torch.tensor([0,2,1,2]), reduction='none').view(2, 2)
    torch.testing.assert_close(loss(pred, *loss.yb), (rows*plan.weights).sum(1).mean())
    loss.yb[0].clamp_(max=0)
    with pytest.raises(RuntimeError, match='changed in place'): loss(pred, *loss.yb)

def test_blended_targets_changed_in_place():
    "The logarithm of a blend is no blend of logarithms"
    loss = MixLoss(nn.MSELoss(), Plan(torch.tensor([[0,1],[1,0]]), torch.tensor([[.7,.3],[.6,.4]])), (torch.rand(2, 1),))
    loss.yb[0].log1p_()
    with pytest.raises(RuntimeError, match='changed in place'): loss(torch.rand(2, 1), *loss.yb)

def test_a_class_instead_of_a_loss():
    with pytest.raises(TypeError, match='the class CrossEntropyLoss: add parentheses'): MixLoss(nn.CrossEntropyLoss)

@pytest.mark.parametrize('weight', [torch.ones(3),torch.ones(5),torch.ones(4).long()], ids=['few','many','integers'])
def test_class_weights_that_do_not_fit(weight):
    plan = Plan.of(torch.tensor([1,0]), torch.tensor([.6,.7]))
    with pytest.raises(ValueError, match='weight must hold a float for each of the 4 classes'): MixLoss(nn.CrossEntropyLoss(weight=weight))(torch.randn(2, 4), torch.tensor([0,2]), plan=plan)

@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_a_class_without_weight_may_be_impossible(reduction):
    "A logit of -inf at the class of a partner that has no weight"
    pred,y,plan = torch.randn(3, 4),torch.tensor([0,1,2]),Plan.of(torch.tensor([1,2,0]), torch.ones(3))
    pred[0,1] = pred[1,2] = -torch.inf
    f = nn.CrossEntropyLoss(reduction=reduction)
    assert_close(MixLoss(f)(pred, y, plan=plan), f(pred, y))
