"Probabilities as targets, and binary cross-entropy for classes"
import pytest, torch, torch.nn.functional as F
from fastai.losses import CrossEntropyLossFlat, LabelSmoothingCrossEntropy
from fastai.metrics import accuracy
from torch import nn
from torch.testing import assert_close
from fastmix.callback import CutMix, MixUp
from fastmix.loss import ClassBCELoss, MixLoss, soft_targets
from fastmix.mixes import Blend, Choice, Cut, Mix
from helpers import Record, class_dls, mk_learn, quiet_fit

def by_hand(plan, y, c):
    shares,one_hot = plan.shares.expand(plan.pairs.shape), F.one_hot(y, c).float()
    return torch.stack([sum(w*one_hot[j] for w,j in zip(ws, js)) for ws,js in zip(shares, plan.pairs)])

w = torch.tensor([.2,1,3,8,1])
@pytest.mark.parametrize('mix', [Blend(1.), Blend(1., k=3), Blend(1., per_batch=True)])
def test_the_loss_on_probabilities(mix):
    pred,y = torch.randn(9, 5), torch.arange(9)%5
    plan = mix.draw(pred)
    t = by_hand(plan, y, 5)
    assert_close(soft_targets(plan, y, 5), t)
    for f in nn.CrossEntropyLoss(), nn.CrossEntropyLoss(w), F.cross_entropy, nn.CrossEntropyLoss(label_smoothing=.1), nn.BCEWithLogitsLoss(), nn.MSELoss():
        assert_close(MixLoss(f, soft=True)(pred, y, plan=plan), f(pred, t))
    assert_close(MixLoss(CrossEntropyLossFlat(weight=w), soft=True)(pred, y, plan=plan), F.cross_entropy(pred, t, w))

def test_dense_and_ignored():
    pred,y = torch.randn(6, 4, 5, 3), torch.randint(0, 4, (6,5,3))
    plan = Choice([Blend(1.), Cut(), Mix()], per_batch=False).draw(torch.rand(6, 3, 5, 3))
    t = soft_targets(plan, y, 4)
    assert t.shape==pred.shape and (t.sum(1)-1).abs().max() < 1e-6
    assert_close(MixLoss(nn.CrossEntropyLoss(), soft=True)(pred, y, plan=plan), MixLoss(nn.CrossEntropyLoss())(pred, y, plan=plan))
    last = CrossEntropyLossFlat(axis=-1)
    assert_close(MixLoss(last, soft=True)(pred.movedim(1, -1), y, plan=plan), F.cross_entropy(pred, t))
    y[:] = -100
    assert not soft_targets(plan, y, 4).any()

@pytest.mark.parametrize('f', [nn.CrossEntropyLoss(), CrossEntropyLossFlat(), F.cross_entropy], ids=str)
def test_only_what_is_to_be_ignored_is(f):
    pred,y = torch.randn(8, 5), torch.arange(8)%5
    plan = Blend(1.).draw(pred)
    want = by_hand(plan, y, 5)
    y[y==4] = -100
    assert_close(MixLoss(f, soft=True)(pred, y, plan=plan), F.cross_entropy(pred, want*(torch.arange(5)!=4)))
    y[2] = -1
    with pytest.raises(RuntimeError, match='out of bounds'): MixLoss(f, soft=True)(pred, y, plan=plan)

def test_smoothing_does_not_reach_what_is_to_be_ignored():
    pred,y = torch.randn(8, 4), torch.arange(8)%4
    loss,plan = MixLoss(nn.CrossEntropyLoss(label_smoothing=.1), soft=True),Blend(1.).draw(pred)
    loss(pred, y, plan=plan)
    y[2] = -100
    with pytest.raises(ValueError, match='leave out label_smoothing'): loss(pred, y, plan=plan)

@pytest.mark.parametrize('thresh,soft', [(None,False), (.2,True)])
def test_bce_of_a_table(thresh, soft):
    "Whose targets have the shape (n, 1)"
    pred,y,loss = torch.randn(8, 4), torch.arange(8)%4, ClassBCELoss(thresh=thresh)
    plan = Blend(1.).draw(pred)
    assert_close(loss(pred, y[:,None]), loss(pred, y))
    assert_close(MixLoss(loss, soft=soft)(pred, y[:,None], plan=plan), MixLoss(loss, soft=soft)(pred, y, plan=plan))

@pytest.mark.parametrize('f', [nn.NLLLoss(weight=w), LabelSmoothingCrossEntropy(), nn.MultiMarginLoss()], ids=repr)
def test_a_loss_that_takes_none(f):
    pred,y = torch.randn(9, 5), torch.arange(9)%5
    with pytest.raises(ValueError, match='does not take probabilities'): MixLoss(f, soft=True)(pred, y, plan=Blend(1.).draw(pred))

@pytest.mark.parametrize('eps', [0., .1])
@pytest.mark.parametrize('shape', [(), (4,3)], ids=str)
def test_bce_by_hand(eps, shape):
    "As timm's: on = 1-ε+ε/C, off = ε/C; linear in the target, so that mixing losses and mixing targets agree"
    pred,y = torch.randn(6, 5, *shape), torch.randint(0, 5, (6,*shape))
    t = torch.full_like(pred, eps/5).scatter_(1, y[:,None], 1-eps+eps/5)
    loss = ClassBCELoss(eps)
    want = -(t*F.logsigmoid(pred) + (1-t)*F.logsigmoid(-pred)).mean()
    assert_close(loss(pred, y), want)
    plan = Blend(1., k=3).draw(torch.rand(6, 2))
    soft = sum(plan.shares[:,i].view(-1, *[1]*(1+len(shape)))*F.one_hot(y[plan.pairs[:,i]], 5).movedim(-1, 1) for i in range(3))
    for got in MixLoss(loss)(pred, y, plan=plan), MixLoss(loss, soft=True)(pred, y, plan=plan): assert_close(got, loss(pred, soft))

def test_a_threshold_counts_both_as_present():
    pred,y = torch.randn(6, 4), torch.arange(6)%4
    plan = Blend(1.).draw(torch.rand(6, 2))
    t = (by_hand(plan, y, 4)>.2).float()
    assert_close(MixLoss(ClassBCELoss(thresh=.2), soft=True)(pred, y, plan=plan), F.binary_cross_entropy_with_logits(pred, t))

@pytest.mark.parametrize('mixer', [lambda: MixUp(1., soft=True), lambda: MixUp(1.), lambda: MixUp(1., soft=True, until=.5), lambda: MixUp(.4, k=3, soft=True)])
def test_in_a_learner(mixer):
    "Trained on mixtures, validated on classes by the same loss"
    learn = mk_learn(class_dls(), loss_func=(own := ClassBCELoss(.1)), cbs=[mixer(), record := Record()], metrics=accuracy)
    quiet_fit(learn, 2)
    for b in record.batches: assert_close(b['loss'], own(b['pred'].detach(), by_hand(b['plan'], b['yb'][0], 4)))
    assert learn.loss_func is own and len(learn.validate())==2
    preds,_,decoded = learn.get_preds(with_decoded=True)
    assert ((preds>0)&(preds<1)).all() and decoded.equal(preds.argmax(1))

def test_floats_are_blended_all_the_same():
    learn = mk_learn(class_dls(), loss_func=nn.MSELoss(), cbs=[CutMix(soft=True)])
    pred,y = torch.randn(6, 4), torch.rand(6, 4)
    plan = Blend(1.).draw(y)
    assert_close(MixLoss(nn.MSELoss(), soft=True)(pred, y, plan=plan), F.mse_loss(pred, plan.mix(y)))
    assert learn.cut_mix.soft

@pytest.mark.parametrize('eps', [-.1, 1.])
def test_bad_smoothing(eps):
    with pytest.raises(ValueError, match='label_smoothing'): ClassBCELoss(eps)
