"`check_mix`: what is right passes, each of the faults seen in the field is caught"
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp as FastaiMixUp
from fastmix.check import check_losses, check_mix
from fastmix.core import draw_lam
from fastmix.mixers import CutMix, MixUp
from fastmix.plan import Plan
from fastmix.regions import Boxes, image_size
from helpers import name_of

@pytest.mark.parametrize('kind', check_losses)
@pytest.mark.parametrize('mixer', [MixUp(1.), CutMix()], ids=name_of)
def test_what_is_right_passes(mixer, kind):
    "`test_mixers.py` has all the others"
    assert check_mix(mixer, kind, n_batches=3) < 1e-6

class Unclipped(CutMix):
    "keras-cv: the box counts in full"
    def plan_for(self, d, alpha):
        lam = draw_lam(d.bs, alpha, d.rng)
        return Plan.of(d.idx(), lam, self.region(lam, image_size(d.x), d.rng))

class OnlyImages(Boxes):
    "fastai: masks are weighted, not cut"
    def is_over(self, y): return y.ndim==4
class CutsNoMasks(CutMix):
    def region(self, lam, size, rng): return OnlyImages(super().region(lam, size, rng).where, size)

class OtherPartners(Plan):
    "Targets of another partner than the image's"
    def mix(self, x): return Plan.of(self.idx.roll(1), self.lam).mix(x) if x.ndim>2 else super().mix(x)
class Confused(MixUp):
    def plan_for(self, d, alpha): return OtherPartners.of(d.idx(), draw_lam(d.bs, alpha, d.rng))

class Forgets(Callback):
    "The images are mixed, the targets are not"
    def before_batch(self): self.learn.xb = (self.xb[0].lerp(self.xb[0].flip(0), .3),)

faults = [(Unclipped(),'classes'), (CutsNoMasks(),'masks'), (Confused(1.),'numbers'), (Confused(1.),'classes'), (Forgets(),'classes'), (Forgets(),'masks')]

@pytest.mark.parametrize('mixer,kind', faults, ids=name_of)
def test_faults_are_caught(mixer, kind):
    with pytest.raises(AssertionError, match='shows the model .* but teaches it'): check_mix(mixer, kind)

def test_codes_that_are_blended_are_caught():
    "fastai's own blends the targets of every loss that has no `y_int`"
    with pytest.raises(AssertionError, match='teaches'): check_mix(FastaiMixUp(1.), 'codes')
    assert check_mix(MixUp(1.), 'codes') < 1e-6

class InPlace(MixUp):
    "The batch of the loader becomes the mixed one"
    def before_batch(self):
        x = self.learn.xb[0]
        super().before_batch()
        self.learn.xb = (x.copy_(self.learn.xb[0]),)

def test_a_mixer_that_overwrites_the_batch_is_caught():
    with pytest.raises(AssertionError, match='writes into the batch'): check_mix(InPlace(1.))

def test_it_leaves_no_trace():
    "Neither on the mixer nor in the global generators"
    mixer,state = MixUp(.4), torch.get_rng_state()
    check_mix(mixer)
    assert torch.get_rng_state().equal(state) and mixer.learn is None

def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="kind must be one of .*masks.*'boxes'"): check_mix(MixUp(.4), 'boxes')
    with pytest.raises(ValueError, match='n_batches must be at least 1, but it is 0'): check_mix(MixUp(.4), n_batches=0)
    with pytest.raises(TypeError, match=r'mixer must be a callback that mixes, such as MixUp\(\.4\), but it is .*MixUp'): check_mix(MixUp)
