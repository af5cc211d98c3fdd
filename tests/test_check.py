"`check_mix`: what is right passes, each of the faults seen in the field is caught"
import pytest, torch
from fastai.callback.core import Callback
from fastmix.callback import CutMix, FMix, GridMix, MixHandler, MixUp, OneOf, ResizeMix, SaliencyMix
from fastmix.check import check_losses, check_mix
from fastmix.core import BlendPlan, CutPlan, draw_boxes, draw_lam
from fastmix.mixes import Blend, Cut

mixers = [MixUp(1.), MixUp(1., fold=False), MixUp(.4, per_batch=True), MixUp(0), CutMix(), CutMix(fold=True), CutMix(per_batch=True)]
mixers += [OneOf(MixUp(.4), CutMix()), CutMix(min_side=.2, max_side=.6), ResizeMix(), ResizeMix(per_batch=True), FMix(), FMix(.5, per_batch=True)]
mixers += [MixUp(1., k=3), MixUp(1., k=4, fold=False), MixUp(.4, per_batch=True, k=3)]
mixers += [FMix(decay=1., fold=True), GridMix(), GridMix(cells=7, per_batch=True), OneOf(ResizeMix(), FMix(), GridMix())]
mixers += [SaliencyMix(), SaliencyMix(.5, per_batch=True), SaliencyMix(fold=True)]

@pytest.mark.parametrize('size', [(16,16), (1,9), (20,), (4,5,6)], ids=str)
@pytest.mark.parametrize('kind', check_losses)
@pytest.mark.parametrize('i', range(len(mixers)))
def test_every_mixer_tells_the_truth(i, kind, size): assert check_mix(mixers[i], kind, size, n_batches=3) < 1e-6

class Unclipped(Cut):
    "keras-cv: the box counts in full"
    def plan(self, x, n, idx):
        lam = draw_lam(n, self.alpha, self.rng)
        plan = CutPlan(draw_boxes(lam, x.shape[2:], self.rng), idx[:,0], x.shape[2:])
        plan.shares = torch.stack([lam, 1-lam], -1)
        return plan

class Uncut(CutPlan):
    "fastai: masks are weighed, not cut"
    def weighs(self, y): return y.ndim<4
class CutsNoMasks(Cut):
    def plan(self, x, n, idx):
        plan = super().plan(x, n, idx)
        plan.__class__ = Uncut
        return plan

class OtherPartners(BlendPlan):
    "Targets of another partner than the picture's"
    def mix(self, x): return BlendPlan(self.lam, self.idx.roll(1)).mix(x) if x.ndim>2 else super().mix(x)
class Confused(Blend):
    def plan(self, x, n, idx): return OtherPartners(draw_lam(n, 1., self.rng), idx[:,0])

class Forgets(Callback):
    "The pictures are mixed, the targets are not"
    def before_batch(self): self.learn.xb = (self.xb[0].lerp(self.xb[0].flip(0), .3),)

faults = [(MixHandler(Unclipped()),'classes'), (MixHandler(CutsNoMasks()),'masks'), (MixHandler(Confused()),'numbers'), (MixHandler(Confused()),'classes'),
    (Forgets(),'classes'), (Forgets(),'masks')]

@pytest.mark.parametrize('mixer,kind', faults, ids=str)
def test_faults_are_caught(mixer, kind):
    with pytest.raises(AssertionError, match='shows the network .* but teaches it'): check_mix(mixer, kind)

class InPlace(MixUp):
    "The batch of the loader becomes the mixed one"
    def before_batch(self):
        x = self.learn.xb[0]
        super().before_batch()
        self.learn.xb = (x.copy_(self.learn.xb[0]),)

def test_a_batch_that_is_overwritten_is_told():
    with pytest.raises(AssertionError, match='writes into the batch'): check_mix(InPlace(1.))

def test_it_leaves_no_trace():
    "Neither in the mixer nor in the global streams"
    mixer,state = MixUp(.4), torch.get_rng_state()
    check_mix(mixer)
    assert torch.get_rng_state().equal(state) and mixer.learn is None

def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="masks.*'boxes'"): check_mix(MixUp(.4), 'boxes')

def test_a_check_of_nothing_is_none():
    with pytest.raises(ValueError, match='n_batches'): check_mix(MixUp(.4), n_batches=0)
    with pytest.raises(TypeError, match='MixHandler'): check_mix(Blend(.4))
