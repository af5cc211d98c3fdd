"More than two samples in a mixture"
from copy import copy
import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropy
from torch import nn
from torch.testing import assert_close
from fastmix.callback import MixUp
from fastmix.core import BlendManyPlan, draw_shares
from fastmix.loss import MixLoss
from fastmix.mixes import Blend
from helpers import Record, class_dls, mk_learn

rng = np.random.default_rng(0)

@pytest.mark.parametrize('k,alpha', [(2,.4), (3,.4), (3,1.), (5,.1)])
def test_shares_are_dirichlet(k, alpha):
    "Mean 1/k and variance (k-1)/(k² (kα+1)); folded, they are the same ones, largest first"
    shares = draw_shares(40_000, alpha, k, rng, fold=False).double()
    assert (shares.sum(1)-1).abs().max() < 1e-6 and (shares.mean(0)-1/k).abs().max() < .01
    assert (shares.var(0)*(k*k*(k*alpha+1))/(k-1) - 1).abs().max() < .05
    a,b = (draw_shares((3,4), alpha, k, np.random.default_rng(1), fold) for fold in (False,True))
    assert b.equal(a.sort(-1, descending=True).values) and b.shape==(3,4,k)

def mean_of(plan, x):
    x,shares = x.double(),plan.shares.expand(plan.pairs.shape).double()
    return torch.stack([sum(w*x[j] for w,j in zip(ws, js)) for ws,js in zip(shares, plan.pairs)])

@pytest.mark.parametrize('per_batch', [False,True])
@pytest.mark.parametrize('shape', [(8,), (8,3,5,4), (600,3,12,12), (6,3,180,180)], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8], ids=str)
def test_the_mixture(shape, dtype, per_batch):
    x = (torch.rand(shape)*200).to(dtype)
    if dtype==torch.uint8 and x.ndim<3: x = x.view(-1, 1, 1)   # bytes of fewer dimensions are categories
    plan,kept = Blend(1., per_batch, k=4).draw(x), x.clone()
    assert all(js.sort().values.equal(torch.arange(len(x))) for js in plan.pairs.unbind(1)) and plan.shares.shape==(1 if per_batch else len(x), 4)
    if len(x)>100: assert all((plan.pairs[:,i]!=plan.pairs[:,j]).float().mean()>.9 for i in range(4) for j in range(i))
    layouts = [x] + ([x.contiguous(memory_format=torch.channels_last)] if x.ndim==4 else [])
    layouts += [x.clone().requires_grad_()] if x.is_floating_point() else []
    for o in layouts:
        got = plan.mix(o)
        assert got.dtype==dtype and got.stride()==o.stride() and x.equal(kept)
        near = dict(rtol=2*torch.finfo(dtype).eps, atol=1e-5) if x.is_floating_point() else dict(rtol=0, atol=.51)
        assert_close(got.double(), mean_of(plan, x), **near)

def soft(plan, y, c=5): return mean_of(plan, F.one_hot(y, c)).float()
w = torch.tensor([.2,1,3,8,1])

@pytest.mark.parametrize('per_batch', [False,True])
def test_class_losses(per_batch):
    "Against probabilities as targets, and a weighted mean written out"
    pred,y = torch.randn(9, 5), torch.arange(9)%5
    plan = Blend(1., per_batch, k=3).draw(pred)
    t,logp = soft(plan, y), pred.log_softmax(1)
    for f in (nn.CrossEntropyLoss(), F.cross_entropy, CrossEntropyLossFlat()): assert_close(MixLoss(f)(pred, y, plan=plan), F.cross_entropy(pred, t))
    assert_close(MixLoss(nn.CrossEntropyLoss(label_smoothing=.1))(pred, y, plan=plan), F.cross_entropy(pred, t, label_smoothing=.1))
    for reduction in ('mean','sum'):
        plain = F.cross_entropy(pred, t, reduction=reduction)
        even = getattr(-logp.mean(1), reduction)()
        assert_close(MixLoss(LabelSmoothingCrossEntropy(.2, reduction=reduction))(pred, y, plan=plan), .8*plain + .2*even)
    y[2] = -100
    num = den = 0.
    for i,(ws,js) in enumerate(zip(plan.shares.expand(9, 3), plan.pairs)):
        for a,j in zip(ws, js):
            if j!=2: num,den = num - a*w[y[j]]*logp[i,y[j]], den + a*w[y[j]]
    assert_close(MixLoss(nn.CrossEntropyLoss(w))(pred, y, plan=plan), num/den)

@pytest.mark.parametrize('per_batch', [False,True])
def test_other_losses(per_batch):
    pred,y = torch.randn(9, 4), torch.rand(9, 4)
    plan = Blend(1., per_batch, k=3).draw(pred)
    assert_close(MixLoss(nn.MSELoss())(pred, y, plan=plan), F.mse_loss(pred, mean_of(plan, y).float()))
    each = mean_of(plan, y)*0
    for i,(ws,js) in enumerate(zip(plan.shares.expand(9, 3), plan.pairs)): each[i] = sum(a*(pred[i]-y[j]).abs() for a,j in zip(ws, js))
    def own(p, y, reduction='mean'): return F.l1_loss(p, y, reduction=reduction)
    for f in (nn.L1Loss(), own): assert_close(MixLoss(f, y_int=True)(pred, y, plan=plan), each.mean().float())
    def root(p, y, reduction='mean'): return F.l1_loss(p, y, reduction=reduction).sqrt()
    if not per_batch:
        with pytest.raises(ValueError, match='per_batch=True'): MixLoss(root, y_int=True)(pred, y, plan=plan)
    else: assert_close(MixLoss(root, y_int=True)(pred, y, plan=plan), sum(a*root(pred, y[js]) for a,js in zip(plan.shares[0], plan.pairs.unbind(1))))

def test_in_a_learner():
    learn = mk_learn(class_dls(), cbs=[mixer := MixUp(.4, k=3), record := Record()])
    learn.fit(1, .1)
    for b in record.batches:
        assert_close(b['mixed'][0].double(), mean_of(b['plan'], b['xb'][0]), rtol=1e-5, atol=1e-5)
        assert_close(b['loss'], F.cross_entropy(b['pred'].detach(), soft(b['plan'], b['yb'][0], 4)))
    assert copy(mixer.mix).k==3 and isinstance(b['plan'], BlendManyPlan)

@pytest.mark.parametrize('k', [1, 0, 2.5, '3', None, True])
def test_bad_k(k):
    with pytest.raises(ValueError, match='k must be a whole number of at least 2'): MixUp(.4, k=k)

def test_off_is_off():
    x = torch.rand(4, 3)
    assert Blend(0, k=3).draw(x).mix(x) is x
