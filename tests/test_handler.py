"Every batch, and every way out of a fit"
import copy, pickle, random, sys
from collections import UserDict, namedtuple
from collections.abc import Mapping
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector
from fastai.callback.core import Callback, CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException
from fastai.callback.core import CancelStepException, CancelTrainException, CancelValidException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp as FastaiMixUp
from fastai.callback.schedule import valley
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.torch_core import TensorImage, set_seed
from fastai.vision.core import TensorPoint
from fastmix.handler import MixHandler, check_mixer, find_mixer
from fastmix.losses import MixLoss
from fastmix.manifold import ManifoldMixUp
from fastmix.mixers import CutMix, MixUp, OneOf
from fastmix.partners import SecondLoader, derange, near_target
from helpers import class_dls, exportable_dls, mk_dls, mk_learn, name_of, quiet_fit, Record

def blended(b): return [torch.lerp(x[b['plan'].idx].double(), x.double(), b['plan'].lam.double().view(-1, *[1]*(x.ndim-1))) for x in b['xb']]

# Every batch

@pytest.mark.parametrize('n', [1, 7, 17, 24])
def test_batch_sizes(n):
    "A batch of one, odd last ones, a last one of one; the loader's tensors are never written to, nor is any batch's output reused"
    learn = quiet_fit(mk_learn(class_dls(n=n, drop_last=False), cbs=[MixUp(), Record()]), 2)
    batches = learn.record.batches
    assert sum(len(b['plan'].idx) for b in batches) >= n
    for b in batches:
        assert b['xb'][0].equal(b['xb0'][0])
        torch.testing.assert_close(b['mixed'][0].double(), blended(b)[0], rtol=1e-5, atol=1e-5)

@pytest.mark.parametrize('cb', [MixUp, CutMix])
@pytest.mark.parametrize('dtype,tol', [(torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float64, 1e-7), (torch.uint8, .5+1e-4)], ids=name_of)
def test_dtypes(cb, dtype, tol):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(3*6*5, 4)
        def forward(self, x): return self.l(x.float().flatten(1))
    x = torch.rand(24, 3, 6, 5)
    x = (x*255).byte() if dtype==torch.uint8 else x.to(dtype)
    for b in quiet_fit(mk_learn(mk_dls([x], [torch.randint(0, 4, (24,))]), Net(), cbs=[cb(), Record()])).record.batches:
        got, = b['mixed']
        assert got.dtype==dtype and not got.equal(b['xb'][0])
        if cb is MixUp: torch.testing.assert_close(got.double(), blended(b)[0], rtol=0, atol=tol)
        else: assert ((got==b['xb'][0]) | (got==b['xb'][0][b['plan'].idx])).all()

def test_channels_last_is_kept():
    class Look(Callback):
        order = 20
        def before_batch(self): self.kept = self.x.is_contiguous(memory_format=torch.channels_last)
    class Cl(Callback):
        order = -1
        def before_batch(self): self.learn.xb = (TensorImage(self.x.contiguous(memory_format=torch.channels_last)),)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for cb in MixUp(), CutMix():
        learn = mk_learn(mk_dls([torch.rand(16, 3, 6, 5)], [torch.randint(0, 4, (16,))]), net, cbs=[cb, Cl(), Look()])
        learn.add_cb(Stop('after_pred', CancelFitException))
        quiet_fit(learn)
        assert learn.look.kept

class Two(nn.Module):
    "An image and a table"
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(3*4*4, 4),nn.Linear(5, 4)
    def forward(self, t, x): return self.a(x.flatten(1)) + self.b(t)

@pytest.mark.parametrize('cb', [MixUp(1.), CutMix(1.), OneOf(MixUp(1.), CutMix(1.))], ids=name_of)
def test_two_inputs_and_one_invariant(cb):
    "Inputs that hold their own class in every element: the mean of each mixed input is the mix of the classes, by the plan's λ"
    y = torch.randint(0, 4, (32,))
    xs = [y.float().view(-1,1).expand(32,5).clone(), y.float().view(-1,1,1,1).expand(32,3,4,4).clone()]
    for b in quiet_fit(mk_learn(mk_dls(xs, [y], n_inp=2), Two(), cbs=[cb, Record()])).record.batches:
        lam,idx,y = b['plan'].lam, b['plan'].idx, b['yb'][0].float()
        for x in b['mixed']: torch.testing.assert_close(x.flatten(1).mean(1), lam*y + (1-lam)*y[idx])

@pytest.mark.parametrize('shape', [(3,1,9), (3,9,1), (2,1,1), (2,11), (1,4,3,2)], ids=name_of)
def test_cutmix_sizes(shape):
    "Images one pixel high, signals and volumes"
    x = torch.rand(32, *shape)
    net = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 4))
    bs = quiet_fit(mk_learn(mk_dls([x], [torch.randint(0, 4, (32,))]), net, cbs=[CutMix(), Record()])).record.batches
    for b in bs:
        kept = (b['mixed'][0]==b['xb'][0])[:,0].flatten(1).float().mean(1)
        partner = b['plan'].idx==torch.arange(len(kept))
        torch.testing.assert_close(kept[~partner], b['plan'].lam[~partner])
    assert any((b['plan'].lam<1).any() for b in bs)

def test_a_float_mask_is_cut_not_blended():
    m = torch.rand(16, 1, 6, 6)
    net = nn.Conv2d(3, 1, 1)
    learn = mk_learn(mk_dls([torch.rand(16, 3, 6, 6)], [m]), net, MSELossFlat(), cbs=CutMix())
    class Look(Callback):
        order,run_valid = 50,False
        def after_pred(self): assert torch.isin(self.y, m).all()
    quiet_fit(learn.add_cb(Look()))

class Autocast(Callback):
    order,run_valid = 10,False
    def before_batch(self):
        self.ctx = torch.autocast('cpu', dtype=torch.bfloat16)
        self.ctx.__enter__()
    def after_loss(self): self.ctx.__exit__(None, None, None)

def test_autocast():
    learn = quiet_fit(mk_learn(class_dls(), loss_func=CrossEntropyLossFlat(), cbs=[MixUp(1.), Autocast(), Record()]))
    for b in learn.record.batches:
        lam,y,idx,p = b['plan'].lam, b['yb'][0], b['plan'].idx, b['pred'].float()
        assert b['pred'].dtype==torch.bfloat16
        want = lam*F.cross_entropy(p, y, reduction='none') + (1-lam)*F.cross_entropy(p, y[idx], reduction='none')
        torch.testing.assert_close(b['loss'].float(), want.mean().detach(), rtol=1e-2, atol=1e-2)

def test_alpha_zero_trains_bit_for_bit_like_no_mixer():
    def weights(cbs): return quiet_fit(mk_learn(class_dls(), cbs=cbs), 2).model.weight
    plain = weights([])
    for off in MixUp(0), CutMix(0): assert weights([off]).equal(plain)
    assert not weights([MixUp(1)]).equal(plain)      # an int is fine

@pytest.mark.parametrize('alpha', [-1, -.001, float('nan'), float('inf'), '0.4', None], ids=name_of)
@pytest.mark.parametrize('cb', [MixUp, CutMix])
def test_bad_alpha(cb, alpha):
    with pytest.raises(ValueError, match=f'alpha.*{alpha!r}'): cb(alpha)

def test_points_are_not_cut():
    pts = mk_dls([torch.rand(16, 3, 6, 6)], [TensorPoint(torch.rand(16, 2, 2))])
    with pytest.raises(ValueError, match='MixUp'): quiet_fit(mk_learn(pts, nn.Conv2d(3, 4, 1), MSELossFlat(), cbs=CutMix()))

def test_a_loss_that_another_callback_brings_is_mixed():
    class Bring(Callback):
        order,run_valid = 20,False
        def before_train(self): self.learn.loss_func = nn.CrossEntropyLoss(label_smoothing=.5)
    def weights(loss_func, *cbs): return quiet_fit(mk_learn(class_dls(), loss_func=loss_func, cbs=[MixUp(1.), *cbs])).model.weight
    assert weights(nn.CrossEntropyLoss(), Bring()).equal(weights(nn.CrossEntropyLoss(label_smoothing=.5)))

def test_one_mixer_and_two_learners():
    "The second takes it over, and says so"
    mixer = MixUp(1.)
    first = mk_learn(class_dls(), cbs=mixer)
    with pytest.warns(UserWarning, match='no longer mixes'): second = mk_learn(class_dls(), cbs=[mixer, Record()])
    assert not hasattr(first, 'mix_up') and mixer not in first.cbs
    assert not quiet_fit(second).record.batches[0]['mixed'][0].equal(second.record.batches[0]['xb'][0])
    with pytest.raises(ValueError, match='on the learner already'): quiet_fit(second, cbs=mixer)
    assert second.mix_up is mixer and mixer.learn is second
    quiet_fit(second)

def test_partners_differ_from_batch_to_batch():
    batches = quiet_fit(mk_learn(class_dls(n=160), cbs=[MixUp(), Record()])).record.batches
    assert len({tuple(b['plan'].idx.tolist()) for b in batches}) > 15

@pytest.mark.filterwarnings('ignore:User provided device_type')
def test_fastais_mixed_precision():
    learn = mk_learn(class_dls(), loss_func=CrossEntropyLossFlat(), cbs=[MixUp(1.), MixedPrecision('bf16')])
    check_own(quiet_fit(learn, 2), learn.loss_func)

def test_torch_loaders():
    x,y = torch.rand(32, 6), torch.arange(32)%4
    dl = torch.utils.data.DataLoader(list(zip(x, y)), batch_size=8)
    learn = quiet_fit(mk_learn(DataLoaders(dl, dl), cbs=[MixUp(1.), Record()]))
    assert all(not b['mixed'][0].equal(b['xb0'][0]) for b in learn.record.batches)

def test_two_mixers():
    for other in CutMix(), FastaiMixUp(.4):
        with pytest.raises(ValueError, match='OneOf'): quiet_fit(mk_learn(class_dls(), cbs=[MixUp(), other]))

# Every way out of a fit

class Stop(Callback):
    "Raise `ex` once, at the event `name`"
    def __init__(self, name, ex, order=0):
        self.order,self.stop_by = order,ex
        setattr(self, name, self.stop)
    def stop(self):
        ex,self.stop_by = self.stop_by,None
        if ex: raise ex

class StopNet(nn.Linear):
    "Raise `ex` in the forward pass"
    ex = None
    def forward(self, x):
        if self.ex: raise self.ex
        return super().forward(x)

ways = 'before_fit before_epoch before_train before_batch after_pred after_loss before_backward after_backward before_step after_step \
    after_batch after_train before_validate after_validate after_epoch after_fit'.split()
cancels = CancelFitException,CancelEpochException,CancelTrainException,CancelBatchException,CancelBackwardException
cancels += CancelStepException,CancelValidException
excs = [*cancels, KeyboardInterrupt, RuntimeError]

def check_own(learn, own):
    "Does `learn` predict as if it had never been mixed, and can it continue to train?"
    dl = learn.dls.valid
    x,y = map(torch.stack, zip(*dl.dataset))
    p = learn.model.eval()(x).detach()
    assert learn.loss_func.activation(p).equal(p.softmax(1)) and learn.loss_func.decodes(p).equal(p.argmax(1))
    assert learn.loss_func(p, y).equal(own(p, y)) and learn.loss_func.reduction=='mean' and learn.loss_func.y_int
    preds,targs,losses = learn.get_preds(with_loss=True)
    torch.testing.assert_close(preds, p.softmax(1))
    torch.testing.assert_close(losses, F.cross_entropy(p, y, reduction='none'))
    with learn.no_logging(): assert abs(learn.validate()[0] - F.cross_entropy(p, y).item()) < 1e-5
    assert learn.loss_func is own and own.reduction=='mean'
    before = learn.model.weight.detach().clone()
    quiet_fit(learn)
    assert learn.loss_func is own and not learn.model.weight.equal(before)

@pytest.mark.parametrize('for_this_fit', [True, False])
@pytest.mark.parametrize('ex', excs)
def test_ways_out(ex, for_this_fit):
    for name in ways+['forward']:
        if (name,ex) == ('before_epoch',CancelEpochException): continue     # fastai's own Recorder fails on this one, mixer or not
        for order in (-50, 50):
            own,mixer = CrossEntropyLossFlat(), MixUp(1.)
            learn = mk_learn(class_dls(n=16), StopNet(6, 4), own, cbs=[] if for_this_fit else mixer)
            cbs = [mixer] if for_this_fit else []
            stop = Stop(name, ex('stop'), order)
            if name=='forward': learn.model.ex = ex('stop')
            else: cbs.append(stop)
            try: quiet_fit(learn, 2, cbs=cbs)
            except (*cancels, KeyboardInterrupt, RuntimeError) as e: assert isinstance(e, ex)
            assert name=='forward' or stop.stop_by is None
            if for_this_fit: assert learn.loss_func is own and not hasattr(learn, 'mix_up')
            if name=='forward': learn.model.ex = None
            learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, Stop)])
            check_own(learn, own)

def test_lr_find_and_fine_tune(tmp_path):
    own = CrossEntropyLossFlat()
    learn = mk_learn(class_dls(n=64), loss_func=own, cbs=MixUp(1.), path=tmp_path)
    with learn.no_logging():
        learn.lr_find(num_it=10, show_plot=False, suggest_funcs=valley)
        assert learn.loss_func is own
        learn.fine_tune(1)
    check_own(learn, own)

def test_validation_inside_a_fit_sees_the_users_own_object():
    own,seen = CrossEntropyLossFlat(), []
    class Look(Callback):
        def after_pred(self): seen.append((self.training, self.learn.loss_func))
    quiet_fit(mk_learn(class_dls(), loss_func=own, cbs=[MixUp(), Look()]))
    assert {t for t,_ in seen} == {True,False}
    for training,loss_func in seen: assert isinstance(loss_func, MixLoss) if training else loss_func is own

def test_a_cancelled_epoch_gives_the_loss_back_at_its_end():
    own,seen = CrossEntropyLossFlat(), []
    class Look(Callback):
        order = 60
        def after_epoch(self): seen.append(self.learn.loss_func)
    quiet_fit(mk_learn(class_dls(), loss_func=own, cbs=[MixUp(), Stop('after_loss', CancelEpochException(), 70), Look()]), 2)
    assert len(seen)==2 and all(o is own for o in seen)

def test_a_leaked_wrapper_is_harmless_without_its_callback():
    own = CrossEntropyLossFlat()
    learn = mk_learn(class_dls(), StopNet(6, 4), own, cbs=MixUp(1.))
    with pytest.raises(KeyboardInterrupt): quiet_fit(learn, cbs=Stop('after_loss', KeyboardInterrupt()))
    leaked = learn.loss_func
    learn.cbs.remove(learn.mix_up)           # not by remove_cb, which would notify the mixer
    assert isinstance(leaked, MixLoss) and learn.loss_func is leaked
    x,y = map(torch.stack, zip(*learn.dls.valid.dataset))
    p = learn.model.eval()(x).detach()
    preds,_,losses = learn.get_preds(with_loss=True)
    torch.testing.assert_close(losses, F.cross_entropy(p, y, reduction='none'))
    assert leaked(p, y).equal(own(p, y)) and own.reduction=='mean'

def test_gradient_accumulation():
    learn = mk_learn(class_dls(), loss_func=CrossEntropyLossFlat(), cbs=[MixUp(1.), GradientAccumulation(16)])
    check_own(quiet_fit(learn), learn.loss_func)

# Pickles and exports

class ExportAt(Callback):
    "Export the learner at the event `name`, and leave the fit"
    def __init__(self, name): setattr(self, name, self.export)
    def export(self):
        if self.learn.opt is None: return    # the learner that was loaded
        self.learn.export('midway.pkl')
        raise CancelFitException

def without_fastmix(monkeypatch):
    for name in [*sys.modules]:
        if name.split('.')[0]=='fastmix': monkeypatch.setitem(sys.modules, name, None)

@pytest.mark.filterwarnings('ignore:load_learner')
@pytest.mark.parametrize('name', ['before_batch', 'after_pred', 'after_loss', 'after_train'])
def test_export_at_any_moment(name, tmp_path):
    "In the middle of a batch, too, the file holds the learner's own loss, and the mixer without its batch"
    learn = mk_learn(exportable_dls(), loss_func=CrossEntropyLossFlat(), path=tmp_path)
    quiet_fit(learn, cbs=[ExportAt(name), MixUp(.3)])
    loaded = load_learner(tmp_path/'midway.pkl')
    assert type(loaded.loss_func) is CrossEntropyLossFlat
    preds = loaded.get_preds(dl=loaded.dls.test_dl([0,1,2]))[0]
    torch.testing.assert_close(preds.sum(1), torch.ones(3))
    assert not quiet_fit(learn).model.weight.isnan().any()      # the learner that was exported trains on
    assert loaded.mix_up.alpha==.3 and loaded.mix_up.record is None

@pytest.mark.filterwarnings('ignore:load_learner')
def test_a_learner_trained_by_one_mixed_fit_loads_without_fastmix(tmp_path, monkeypatch):
    learn = quiet_fit(mk_learn(exportable_dls(), loss_func=CrossEntropyLossFlat(), path=tmp_path), cbs=MixUp())
    learn.export('after.pkl')
    assert b'fastmix' not in (tmp_path/'after.pkl').read_bytes()
    without_fastmix(monkeypatch)
    assert type(load_learner(tmp_path/'after.pkl').loss_func) is CrossEntropyLossFlat

def test_the_callback_pickles_and_copies_without_a_batch():
    for cb,attrs in (MixUp(.3, per_batch=True, fold=False), dict(alpha=.3, per_batch=True, fold=False)), (CutMix(.7), dict(alpha=.7, fold=False)):
        dls = mk_dls([torch.rand(512, 3, 16, 16)], [torch.randint(0, 4, (512,))], bs=256)
        learn = mk_learn(dls, nn.Sequential(nn.Flatten(), nn.Linear(3*256, 4)))
        quiet_fit(learn, cbs=cb)
        file = pickle.dumps(cb)
        assert len(file) < 4096
        for other in pickle.loads(file), copy.deepcopy(cb):
            assert all(getattr(other, k)==v for k,v in attrs.items()) and other.record is None
            quiet_fit(learn, cbs=other)

# Randomness

def weights(*cbs, seed=None, learn=None):
    if not learn:
        dls = mk_dls([torch.arange(32*36.).view(32,1,6,6).sin()], [torch.arange(32)%4], shuffle=True)
        learn = mk_learn(dls, nn.Sequential(nn.Flatten(), nn.Linear(36, 4)))
    if seed is not None: set_seed(seed)
    lams = []
    class Lam(Callback):
        run_valid = False
        def after_batch(self): lams.extend([cb.lam for cb in self.learn.cbs if isinstance(cb, MixHandler)])
    quiet_fit(learn, cbs=[*cbs, Lam()])
    return parameters_to_vector(learn.model.parameters()), torch.cat(lams) if lams else None

@pytest.mark.parametrize('cb', [MixUp(), CutMix(), OneOf(OneOf(MixUp(), CutMix(), p=[.3,.7]), MixUp())], ids=name_of)
def test_set_seed_repeats_even_with_the_same_object(cb):
    a,la = weights(cb, seed=7)
    b,lb = weights(cb, seed=7)
    assert a.equal(b) and la.equal(lb)
    assert not la.equal(weights(cb, seed=8)[1])

def test_successive_fits_differ():
    learn,cb = mk_learn(class_dls()), MixUp()
    assert not weights(cb, learn=learn)[1].equal(weights(cb, learn=learn)[1])

def test_mixing_advances_no_global_stream():
    "Dropout, augmentation and shuffling draw the same numbers with a mixer as without"
    class Draw(Callback):
        order,run_valid = 30,False
        def before_fit(self): self.drawn = []
        def before_batch(self): self.drawn.append((random.random(), np.random.rand(), torch.rand(1).item(), self.yb[0].sum().item()))
    def drawn(*cbs):
        learn = mk_learn(class_dls(shuffle=True), nn.Sequential(nn.Linear(6, 4), nn.Dropout(.5)), cbs=[Draw(), *cbs])
        set_seed(3)
        return quiet_fit(learn, 2).draw.drawn
    plain = drawn()
    assert len(plain)==8
    for cb in MixUp(), CutMix(0), MixUp(per_batch=True): assert drawn(cb)==plain

@pytest.mark.parametrize('cb', [MixUp, CutMix])
def test_every_batch_of_an_epoch_can_be_kept(cb):
    "Memory is reused, but not while a batch is held, wide rows included"
    class Keep(Callback):
        run_valid = False
        def before_fit(self): self.kept = []
        def after_batch(self): self.kept.append((self.learn.xb[0], self.learn.xb[0].clone()))
    keep = Keep()
    dls = mk_dls([torch.rand(24, 3, 120, 120)], [torch.arange(24)%4], bs=4)
    quiet_fit(mk_learn(dls, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)), nn.CrossEntropyLoss(), cbs=[cb(1.), keep]), 2)
    assert len(keep.kept)==12 and all(x.equal(copy) for x,copy in keep.kept)
    assert len({x.data_ptr() for x,_ in keep.kept})==12

@pytest.mark.parametrize('event', ['before_epoch','before_train','before_batch','after_batch'])
@pytest.mark.parametrize('first', [MixUp, FastaiMixUp])
def test_a_second_mixer_in_the_middle_of_a_fit_is_refused(event, first):
    class Adds(Callback):
        run_valid = False
    def add(self):
        if not self.done: self.learn.add_cb(CutMix(fold=True))
        self.done = True
    Adds.done = False
    setattr(Adds, event, add)
    own = CrossEntropyLossFlat()
    learn = mk_learn(class_dls(), loss_func=own, cbs=[first(.4), Adds()])
    with pytest.raises(ValueError, match='would each mix what the other has mixed'): quiet_fit(learn)
    learn.remove_cb(CutMix)
    with learn.no_logging(): learn.validate()
    if first is MixUp: assert learn.loss_func is own   # fastai's leaves its own behind

def test_a_mixer_that_comes_in_the_middle_of_a_fit_mixes_from_the_next_batch():
    class Adds(Callback):
        def before_batch(self):
            if self.training and not self.iter: self.learn.add_cb(MixUp(1.))
    quiet_fit(mk_learn(class_dls(), cbs=[Adds(), record := Record()]), lr=0.)
    mixed = [not b['mixed'][0].equal(b['xb0'][0]) for b in record.batches]
    assert mixed==[False,True,True,True]

def test_a_mixer_is_removed_after_a_batch_that_was_cancelled():
    class Cancels(Callback):
        run_valid = False
        def after_pred(self): raise CancelBatchException
        def after_cancel_batch(self):
            if hasattr(self.learn, 'mix_up'): self.learn.remove_cb(MixUp)
    learn = quiet_fit(mk_learn(class_dls(), cbs=[MixUp(1.), Cancels()]))
    assert not hasattr(learn, 'mix_up') and not isinstance(learn.loss_func, MixLoss)

def removes(event, order=0):
    class Removes(Callback):
        run_valid = False
    def remove(self):
        if self.train_iter==1: self.learn.remove_cb(MixUp)
    Removes.order = order
    setattr(Removes, event, remove)
    return Removes()

@pytest.mark.parametrize('event,order,n', [('before_batch',-5,1), ('after_loss',5,2), ('before_step',0,2), ('after_batch',5,1)])
def test_a_mixer_is_removed_before_its_batch_or_after_the_loss(event, order, n):
    learn = mk_learn(class_dls(), cbs=[MixUp(1.), removes(event, order), record := Record()])
    own = quiet_fit(learn, lr=0.).loss_func
    assert not isinstance(own, MixLoss) and not hasattr(learn, 'mix_up')
    for i,b in enumerate(record.batches):
        assert b['loss'].isclose(nn.functional.cross_entropy(b['pred'], b['yb'][0]))==(i>=n)
        assert b['mixed'][0].equal(b['xb0'][0])==(i>=n)


# The safeguard, and what stands in for fastai's own classes

def change_yb(f, order=20):
    class Change(Callback):
        run_valid = False
        def before_batch(self): self.learn.yb = f(self.learn.yb)
    Change.order = order
    return Change()

numbers = mk_dls([torch.randn(32, 6)], [torch.randn(32, 4)])

@pytest.mark.parametrize('dls,loss_func', [(class_dls(), nn.CrossEntropyLoss()), (numbers, nn.MSELoss())], ids=['classes','numbers'])
def test_changed_targets_or_losses_never_train_unmixed(dls, loss_func):
    "A callback may change them before the mixer. Later it is an error, after which the learner has its own loss again"
    class Swap(Callback):
        order,run_valid = 20,False
        def before_batch(self): self.learn.loss_func = type(loss_func)()
    for late in Swap(), change_yb(lambda yb: (yb[0].clone(),)), change_yb(lambda yb: (yb[0].flip(0),)):
        learn = mk_learn(dls, loss_func=loss_func, cbs=[MixUp(1.), late])
        weights = learn.model.weight.clone()
        with pytest.raises(RuntimeError, match='its loss was not mixed.*`order` below 9.5'): quiet_fit(learn)
        assert learn.model.weight.equal(weights)
        learn.remove_cb(late)
        quiet_fit(learn)
        assert isinstance(learn.loss_func, type(loss_func))
    quiet_fit(mk_learn(dls, loss_func=loss_func, cbs=[MixUp(1.), change_yb(lambda yb: (yb[0].clone(),), order=5)]))

@pytest.mark.parametrize('event', ['before_batch', 'after_pred'])
def test_a_mixer_that_is_removed_before_the_loss_of_its_batch_says_so(event):
    learn = mk_learn(class_dls(), cbs=[MixUp(1.), removes(event, 20)])
    own = learn.loss_func
    with pytest.warns(UserWarning, match='removed before the loss of a batch'): quiet_fit(learn, lr=0.)
    assert learn.loss_func is own and not hasattr(learn, 'mix_up')

class Overrides(MixUp):
    "As fastai's own mixers are written"
    def before_batch(self): self.learn.xb = (self.learn.xb[0].flip(0),)
class Extends(MixUp):
    def before_batch(self):
        super().before_batch()
        self.seen = self.lam
class HasLf(MixUp):
    def lf(self, pred, *yb): return self.old_lf(pred, *yb)
class HasDistrib(MixUp):
    def __init__(self):
        super().__init__()
        self.distrib = torch.distributions.Beta(.1, .1)

def test_classes_written_for_fastais_mixers():
    learn = mk_learn(class_dls(), cbs=Extends(1.))
    assert len(quiet_fit(learn).extends.seen)==8
    with pytest.raises(RuntimeError, match=r'super\(\).before_batch'): quiet_fit(mk_learn(class_dls(), cbs=Overrides(1.)))
    for cls,name in (HasLf,'lf'),(HasDistrib,'distrib'):
        with pytest.raises(TypeError, match=f"{cls.__name__} has '{name}'"): quiet_fit(mk_learn(class_dls(), cbs=cls()))
    for make in (lambda: MixHandler(.4)),(lambda: MixHandler()):
        with pytest.raises(TypeError, match=r'write MixUp\(0.4\)'): make()

def test_the_record():
    "It exists in training only, with the batch before mixing; files and copies do not hold it"
    class Look(Callback):
        order = 80
        def after_batch(self):
            record = self.mix_up.record
            assert (record is not None)==self.training and (self.mix_up.lam is not None)==self.training
            if record: assert self.mix_up.lam is record.plan.lam or self.mix_up.lam.equal(record.plan.lam)
        def after_pred(self):
            if self.training: assert self.mix_up.record.xb[0].shape==self.x.shape and self.learn.loss_func is self.mix_up.record.loss
    learn = quiet_fit(mk_learn(class_dls(), cbs=[MixUp(1.), Look()]), 2)
    assert learn.mix_up.record is None
    per_batch = {k for k,v in vars(learn.mix_up).items() if isinstance(v, (torch.Tensor,MixLoss))}
    assert not per_batch

def test_the_preview_that_fastai_documents():
    learn = mk_learn(class_dls(), cbs=MixUp(1.))
    own,learn.epoch,learn.training = learn.loss_func,0,True
    for _ in range(2):
        b = learn.dls.one_batch()
        learn._split(b)
        learn('before_train')
        learn('before_batch')
        assert not learn.x.equal(b[0]) and learn.y.equal(b[1])
    with learn.no_logging(): learn.validate()
    quiet_fit(learn)
    assert learn.loss_func is own

def test_sharpness_aware_minimisation():
    "A second loss on the same batch, after the first step, is the mixed one too"
    class SAM(Callback):
        run_valid = False
        def after_backward(self):
            record,again = self.mix_up.record,self.learn.loss_func(self.learn.model(*self.learn.xb), *self.learn.yb)
            assert again.item()==pytest.approx(self.learn.loss.item(), rel=1e-5) and self.learn.loss_func is record.loss
    quiet_fit(mk_learn(class_dls(), cbs=[MixUp(1.), SAM()]))

def test_an_own_loss_that_cannot_be_taken_apart_in_a_later_batch():
    "A mean over the labels that are known, of which some are missing in the fourth batch only"
    class Known(nn.Module):
        reduction = 'mean'
        def forward(self, pred, y):
            u,known = F.cross_entropy(pred, y.clamp_min(0), reduction='none'),y>=0
            return u*known if self.reduction=='none' else (u*known).sum()/known.sum()
    y = torch.arange(32)%4
    y[28:] = -1
    learn = mk_learn(mk_dls([torch.randn(32, 6)], [y]), loss_func=Known(), cbs=MixUp(1.))
    with pytest.raises(ValueError, match='cannot be mixed sample by sample.*per_batch=True'): quiet_fit(learn)
    quiet_fit(mk_learn(learn.dls, loss_func=Known(), cbs=MixUp(1., per_batch=True)))

# Nests of inputs, and second gradients

class Siamese(nn.Module):
    "Two images, in any nest"
    def __init__(self):
        super().__init__()
        self.body,self.out = nn.Sequential(nn.Flatten(), nn.Linear(3*5*4, 6)),nn.Linear(12, 4)
    def read(self, a, b): return self.out(torch.cat([self.body(a), self.body(b)], 1))
    def forward(self, x, *rest): return self.read(x, *rest) if rest else self.read(*(x.values() if isinstance(x, Mapping) else x))

Pair = namedtuple('Pair', 'a b')
nests = dict(tuple=lambda a,b: ((a,b),), list=lambda a,b: ([a,b],),
    named=lambda a,b: (Pair(a,b),), dict=lambda a,b: (dict(a=a, b=b),), mapping=lambda a,b: (UserDict(a=a, b=b),))

@pytest.mark.parametrize('mixer', [MixUp(1.), CutMix(partners=derange)], ids=name_of)
@pytest.mark.parametrize('nest', nests)
def test_nests(nest, mixer):
    class Nest(Callback):
        order = -3
        def before_batch(self): self.learn.xb = nests[nest](*self.learn.xb)
    class Look(Callback):
        order,run_valid = 20,False
        def before_batch(self): self.parts = self.mixer.record.xs
        def after_loss(self):
            plan = self.mixer.record.plan
            torch.testing.assert_close(self.learn.pred, self.learn.model(*map(plan.mix, self.parts)))
    Look.mixer = mixer
    dls = mk_dls([torch.randn(32, 3, 5, 4), torch.randn(32, 3, 5, 4)], [torch.arange(32)%4], n_inp=2)
    quiet_fit(mk_learn(dls, Siamese(), cbs=[mixer, Nest(), Look()]), lr=0.)

@pytest.mark.parametrize('mixer', [MixUp(1.), ManifoldMixUp(1., layers='0')], ids=name_of)
def test_a_second_gradient_of_the_batch_is_the_first(mixer):
    "As of sharpness-aware minimisation with ρ = 0"
    class Twice(Callback):
        run_valid = False
        def before_step(self):
            first = [p.grad.clone() for p in self.model.parameters()]
            self.model.zero_grad()
            self.learn.loss_func(self.model(*self.learn.xb), *self.learn.yb).backward()
            for a,b in zip(first, self.model.parameters()): torch.testing.assert_close(a, b.grad)
    quiet_fit(mk_learn(class_dls(), nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), cbs=[mixer, Twice()]))

def test_a_batch_that_is_cancelled_leaves_the_next_one_alone():
    class Skip(Callback):
        order,run_valid = 5,False
        def before_batch(self):
            if not self.iter: raise CancelBatchException
    quiet_fit(mk_learn(class_dls(), cbs=[MixUp(1., until=.1), Skip()]))

def test_a_float_mask_of_a_second_loader_is_not_cut_without_partners():
    dl = [(torch.rand(8, 3, 6, 6),)]*9
    dls = mk_dls([torch.rand(16, 3, 6, 6)], [torch.rand(16, 1, 6, 6)])
    with pytest.raises(ValueError, match='mask cannot be cut|larger weight'):
        quiet_fit(mk_learn(dls, nn.Conv2d(3, 1, 1), MSELossFlat(), cbs=CutMix(fold=True, partners=SecondLoader(dl))))

# What a callback does in the middle of a batch

class Validates(Callback):
    "Validates in the middle of the second batch, and puts the learner's state back"
    order,on = 5,False
    def __init__(self, event, method):
        self.method = method
        setattr(self, event, self.validate)
    def validate(self):
        learn = self.learn
        if self.on or not learn.training or learn.train_iter!=1: return
        self.on,was = True,{k:getattr(learn, k) for k in ('xb','yb','pred','dl','training','iter','train_iter','pct_train','loss','loss_grad') if hasattr(learn, k)}
        with learn.no_bar(),learn.no_logging(): getattr(learn, self.method)()
        for k,v in was.items(): setattr(learn, k, v)
        self.on = False

@pytest.mark.parametrize('method', ['validate','get_preds'])
def test_validation_before_the_loss_of_a_batch_is_an_error(method):
    own = CrossEntropyLossFlat()
    learn = mk_learn(class_dls(), loss_func=own, cbs=[MixUp(1.), Validates('after_pred', method)])
    with pytest.raises(RuntimeError, match='validated or predicted in the middle of it.*in after_batch'): quiet_fit(learn)
    learn.remove_cb(learn.validates)
    check_own(learn, own)

@pytest.mark.parametrize('event', ['after_loss','after_backward','after_batch'])
@pytest.mark.parametrize('method', ['validate','get_preds'])
def test_validation_after_the_loss_of_a_batch(event, method):
    learn = mk_learn(class_dls(), cbs=[MixUp(1.), Validates(event, method), Record()])
    for b in quiet_fit(learn).record.batches: torch.testing.assert_close(b['loss'], mixed_ce(b))

def mixed_ce(b):
    y,plan = b['yb'][0],b['plan']
    u,u1 = (F.cross_entropy(b['pred'], o, reduction='none') for o in (y,y[plan.idx]))
    return (plan.lam*u + (1-plan.lam)*u1).mean()

def test_partners_see_numbers_where_the_loss_does():
    "Ages are numbers, whatever their type; classes are not"
    x,y = torch.randn(32, 6),torch.arange(32)[:,None]
    for b in quiet_fit(mk_learn(mk_dls([x], [y]), nn.Linear(6, 1), MSELossFlat(), cbs=[MixUp(1., partners=near_target), Record()])).record.batches:
        y,plan = b['yb'][0].float(),b['plan']
        torch.testing.assert_close(b['loss'], F.mse_loss(b['pred'], plan.lam[:,None]*y + (1-plan.lam[:,None])*y[plan.idx]))
    with pytest.raises(ValueError, match='near_target needs numbers'): quiet_fit(mk_learn(class_dls(), cbs=MixUp(1., partners=near_target)))
    quiet_fit(mk_learn(mk_dls([x], [y]), nn.Linear(6, 1), lambda p,y: (p-y).abs().mean(), cbs=MixUp(1., partners=near_target, y_int=False)))

def test_a_mixer_of_fastai_is_named():
    with pytest.raises(ValueError, match='has MixUp of fastai.callback.mixup, which is no mixer of fastmix'): find_mixer(mk_learn(class_dls(), cbs=FastaiMixUp()))
    with pytest.raises(TypeError, match=r'as in Mixing\(MixUp\(.4\)\), but it is .* of fastai.callback.mixup'): check_mixer(FastaiMixUp(), 'Mixing(MixUp(.4))')

def test_a_loss_that_is_replaced_before_the_backward_pass():
    class Late(Callback):
        order,run_valid = 20,False
        def before_backward(self): self.learn.loss_grad = F.cross_entropy(self.learn.pred, self.learn.y)
    learn = mk_learn(class_dls(), cbs=[MixUp(1.), Late()])
    before = learn.model.weight.clone()
    with pytest.raises(RuntimeError, match='another one is trained'): quiet_fit(learn)
    assert learn.model.weight.equal(before)

def test_blended_targets_that_are_put_back_before_the_loss():
    "Even after a call of the loss with the blended targets"
    class Back(Callback):
        order,run_valid = 20,False
        def before_batch(self): self.own = self.mix_up.record.yb
        def after_pred(self):
            self.learn.loss_func(self.pred, *self.yb)
            self.learn.yb = self.own
    learn = mk_learn(mk_dls([torch.randn(16, 6)], [torch.rand(16, 4)]), None, nn.MSELoss(), cbs=[MixUp(1.), Back()])
    with pytest.raises(RuntimeError, match='its loss was not mixed'): quiet_fit(learn)
