"What a loss was configured with, and what is claimed of PyTorch's and fastai's own"
from functools import partial, wraps
import pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.losses import BaseLoss, BCELossFlat, BCEWithLogitsLossFlat, CrossEntropyLossFlat, DiceLoss, FocalLossFlat, L1LossFlat
from fastai.losses import LabelSmoothingCrossEntropyFlat, MSELossFlat
from fastmix._loss_config import class_loss, is_separable, is_standard, loss_option, mixes_losses
from helpers import name_of

w = torch.tensor([.2, 1., 3.])
class Method:
    def loss(self, p, y, reduction='sum'): pass
    def __call__(self, p, y, reduction='mean'): pass
@wraps(F.cross_entropy)
def passes_on(*args, **kwargs): pass
@wraps(F.cross_entropy)
def keeps(p, y): pass

@pytest.mark.parametrize('f,option,separable', [(nn.L1Loss(), 'mean', True), (nn.L1Loss(reduction='sum'), 'sum', True),
    (MSELossFlat(reduction='none'), 'none', True), (F.mse_loss, 'mean', True), (Method(), 'mean', True), (Method().loss, 'sum', True),
    (partial(partial(F.mse_loss, reduction='mean'), reduction='sum'), 'sum', True), (passes_on, 'mean', True), (keeps, None, False),
    (lambda p,y: None, None, False), (nn.KLDivLoss(reduction='batchmean'), 'batchmean', False),
    (partial(nn.L1Loss()), 'mean', False), (max, None, False)])
def test_reduction(f, option, separable): assert (loss_option(f, 'reduction'),is_separable(f))==(option,separable)

@pytest.mark.parametrize('f,want', [(CrossEntropyLossFlat(weight=w, ignore_index=2, axis=1), (w,2,0.,'mean',1)),
    (nn.NLLLoss(reduction='sum'), (None,-100,0.,'sum',None)),
    (partial(partial(F.cross_entropy, weight=w), label_smoothing=.1, ignore_index=1), (w,1,.1,'mean',None)),
    (LabelSmoothingCrossEntropyFlat(weight=w), (w,-100,0.,'mean',-1))])
def test_class_losses_are_read(f, want): assert class_loss(f)[1:]==want and is_standard(f) and mixes_losses(f, torch.tensor([0]))

class Own(nn.CrossEntropyLoss): pass
@pytest.mark.parametrize('f', [Own(), partial(F.cross_entropy, size_average=False), CrossEntropyLossFlat(flatten=False),
    CrossEntropyLossFlat(is_2d=False), BaseLoss(Own), CrossEntropyLossFlat(axis=0),
    nn.CrossEntropyLoss(reduction='avg'), nn.CTCLoss(), lambda p,y: None])
def test_what_is_changed_is_the_users_own(f):
    assert class_loss(f) is None and not is_standard(f)
    assert mixes_losses(f, torch.tensor([0.])) and not mixes_losses(f, torch.tensor([0.]), y_int=False)

plain = [nn.BCELoss, nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss, nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss]
plain += [nn.PoissonNLLLoss, BCELossFlat, BCEWithLogitsLossFlat, L1LossFlat]
plain += [partial(partial, f) for f in (F.binary_cross_entropy, F.binary_cross_entropy_with_logits, F.multilabel_soft_margin_loss)]
plain += [partial(partial, f) for f in (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.poisson_nll_loss)]
@pytest.mark.parametrize('make', plain, ids=name_of)
def test_known_losses_take_the_plain_mean_and_blended_numbers(make):
    p,y = torch.rand(2, 6, 3)
    each = make(reduction='none')(p, y)
    assert each.mean().isclose(make(reduction='mean')(p, y)) and each.sum().isclose(make(reduction='sum')(p, y))
    assert is_standard(make()) and not mixes_losses(make(), y) and not mixes_losses(make(), y.long()) and mixes_losses(make(), y, y_int=True)

@pytest.mark.parametrize('make', [FocalLossFlat, partial(FocalLossFlat, weight=w), DiceLoss], ids=name_of)
def test_focal_and_dice_take_the_plain_mean(make):
    p,y = torch.rand(6, 3, 2),torch.randint(0, 3, (6,2))
    if make is not DiceLoss: p,y = p[...,0],y[:,0]
    assert is_standard(make()) and make(reduction='none')(p, y).mean().isclose(make(reduction='mean')(p, y))

def test_a_weight_for_each_value_makes_another_mean():
    assert is_standard(F.mse_loss) and not is_standard(partial(F.mse_loss, weight=torch.ones(3)))
