"Every mix × partner × target: what is taught is what is shown, and the loss is the one of what is shown; the rest is refused"
from functools import partial
import pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.progress import *
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from fastmix.callback import CutMix, CutMixUp, FMix, GridMix, MixUp, OneOf, ResizeMix, SaliencyMix
from fastmix.check import Answer, _target, check_losses, check_mix
from fastmix.core import balanced, derange, near_target, other_class, same_class
from fastmix.data import SecondLoader
from fastmix.manifold import ManifoldMixUp

size = 10,8
mixers = dict(mixup=MixUp, unfolded=partial(MixUp, 1., fold=False), k3=partial(MixUp, 1., k=3), per_batch=partial(MixUp, per_batch=True), cut=CutMix,
    resize=ResizeMix, saliency=SaliencyMix, fmix=FMix, grid=GridMix, half=partial(CutMix, p=.5), cutmixup=CutMixUp, manifold=partial(ManifoldMixUp, layers='input'),
    each=partial(OneOf, MixUp(1., k=3), CutMix(), ResizeMix(), None, per_batch=False), soft=partial(MixUp, soft=True))

def pictures(kind, n, seed):
    v = (torch.rand(n, generator=torch.Generator().manual_seed(seed)) < .5).float()
    return list(zip(v.view(-1, 1, 1, 1).expand(-1, 3, *size), _target(kind, v, size)))

def next_one(xb, yb, rng): return torch.arange(len(xb[0])).roll(-1)
def second(kind): return SecondLoader(DataLoader(pictures(kind, 20, 7), bs=6, shuffle=True, num_workers=0))
on_classes,on_numbers = {'classes'},{'labels','numbers','maps'}
partners = dict(shuffle=(None,set(check_losses)), derange=(derange,set(check_losses)), same_class=(same_class,on_classes), other_class=(other_class,on_classes),
    balanced=(balanced,on_classes), near_target=(near_target,on_numbers), own=(next_one,set(check_losses)), second=(second,set(check_losses)))

class Compare(Callback):
    "The loss of each batch, and that of what the network was shown"
    order = 50
    def __init__(self, kind): self.kind,self.pairs = kind,[]
    def after_loss(self):
        if not self.training: return
        x,pred = self.learn.xb[0], self.learn.pred.detach()
        m = x.mean(1) if self.kind in ('masks','maps') else x.flatten(1).mean(1)
        both = torch.stack([1-m, m], 1)
        want = dict(classes=lambda: F.cross_entropy(pred, both), labels=lambda: F.binary_cross_entropy_with_logits(pred, both),
            numbers=lambda: F.mse_loss(pred[:,0], m), masks=lambda: F.cross_entropy(pred.movedim(-1, 1), both), maps=lambda: F.mse_loss(pred[...,0], m))
        self.pairs.append((self.learn.loss.detach(), want[self.kind]()))

def losses(mixer, kind):
    set_seed(1)
    items = pictures(kind, 32, 3)
    shape = 8,*(size if kind in ('masks','maps') else ()),1 if kind in ('numbers','maps') else 2
    learn = Learner(DataLoaders.from_dsets(items, items, bs=8, num_workers=0, device='cpu'), Answer(torch.randn(shape)), check_losses[kind], opt_func=SGD)
    with learn.no_bar(),learn.no_logging(): learn.fit(1, lr=.1, cbs=[mixer, seen := Compare(kind)])
    return seen.pairs

@pytest.mark.parametrize('kind', check_losses)
@pytest.mark.parametrize('who', partners)
@pytest.mark.parametrize('name', mixers)
def test_each_with_each(name, who, kind):
    f,kinds = partners[who]
    def mixer(): return mixers[name](partners=second(kind) if who=='second' else f)
    if kind not in kinds:
        with pytest.raises(ValueError, match=f'{f.__name__} needs'): losses(mixer(), kind)
        return
    for got,want in losses(mixer(), kind): torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert name=='manifold' or who=='second' or check_mix(mixer(), kind, size, n_batches=2) < 1e-6
