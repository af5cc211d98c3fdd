"Every mixer: it teaches what it shows, by turns too; schedules, refusals, and what a mixer says of itself"
import pickle
from copy import deepcopy
from functools import partial
import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp as FastaiMixUp
from fastai.callback.schedule import SchedCos, SchedLin, SchedNo, combine_scheds
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from torch import nn
from torch.testing import assert_close
from fastmix.beta import RegionMix
from fastmix.check import check_losses, check_mix
from fastmix.losses import MixLoss
from fastmix.manifold import ManifoldMixUp
from fastmix.mixers import CutMix, CutMixUp, FMix, GridMix, MixUp, OneOf, ResizeMix, SaliencyMix
from fastmix.partners import SecondLoader, derange, same_class
from fastmix.plan import JoinedPlan
from fastmix.regions import Boxes
from helpers import class_dls, mk_learn, name_of, quiet_fit, Record

each = partial(OneOf, per_batch=False)
mixers = [MixUp(1., fold=False), MixUp(1., k=3), MixUp(per_batch=True), CutMix(), CutMix(per_batch=True), ResizeMix(), SaliencyMix(), FMix(), GridMix(),
    MixUp(1., p=.5), CutMix(p=.5), MixUp(soft=True), CutMix(fold=True, min_side=.2, max_side=.6), ResizeMix(per_batch=True), FMix(.5, decay=1., per_batch=True),
    GridMix(cells=7, per_batch=True), SaliencyMix(.5, per_batch=True, fold=True), ManifoldMixUp(layers='input'), CutMixUp(),
    each(MixUp(1., k=3), CutMix(per_batch=True), ResizeMix(), None),
    each(each(MixUp(1.), CutMix()), each(GridMix(), MixUp(.4, k=4), FMix(p=.5)))]

@pytest.mark.parametrize('kind', check_losses)
@pytest.mark.parametrize('i', range(len(mixers)))
def test_what_is_taught_is_what_is_shown(i, kind): assert check_mix(mixers[i], kind, (10,8), n_batches=3) < 1e-6

@pytest.mark.parametrize('kind', ['masks','maps','classes'])
@pytest.mark.parametrize('size', [(1,9), (20,), (4,5,6)], ids=name_of)
def test_signals_and_volumes(size, kind):
    for m in CutMix(), ResizeMix(), SaliencyMix(), FMix(), GridMix(), each(MixUp(1.), CutMix(), None): assert check_mix(m, kind, size, n_batches=2) < 1e-6

def test_defaults():
    "Those of fastai's own"
    assert (MixUp().alpha, MixUp().fold, CutMix().alpha, CutMix().fold) == (.4, True, 1., False)

def test_off_is_off():
    x = torch.rand(4, 3, 5, 5)
    for m in MixUp(0), MixUp(0, k=3), CutMix(0), SaliencyMix(0), FMix(0), MixUp(p=0), OneOf(None): assert m.draw(x).mix(x) is x

# Randomness

def lams(make, n=3):
    x = torch.rand(8, 1, 6, 6)
    return torch.cat([m.draw(x).lam for m in (make() for _ in range(n))])

@pytest.mark.parametrize('make', [MixUp, CutMix, partial(each, MixUp(), CutMix(), None)])
def test_a_mixer_made_anew_does_not_repeat_itself(make):
    "As in a function that makes a mixer at each call; after the same `set_seed` all of them repeat themselves"
    def drawn(seed):
        set_seed(seed)
        return lams(make)
    a,b = drawn(3),drawn(3)
    assert a.equal(b) and not a.equal(drawn(4))
    assert len({tuple(o.tolist()) for o in a.view(3, -1)})==3

def test_weights_of_turns():
    m,counts = OneOf(MixUp(1.), CutMix(), None, p=[1,2,5], per_batch=False),torch.zeros(3)
    for _ in range(60):
        plan = m.draw(torch.rand(40, 1, 6, 6))
        cut = plan.region.mask.flatten(1).any(1) if plan.region else torch.zeros(40, dtype=torch.bool)
        blended = ~cut & (plan.lam<1)
        counts += torch.stack([blended.sum(), cut.sum(), (~cut & ~blended).sum()])
    want = torch.tensor([1,2,5])/8
    assert (counts/2400-want).abs().max() < .06   # a box may be empty, and a λ 1

def test_p_of_the_samples_stay_as_they_are():
    x = torch.rand(4000, 1)
    plan = MixUp(1., p=.3, fold=False, partners=derange).draw(x)
    alone = plan.idx==torch.arange(4000)
    assert abs(alone.float().mean().item()-.7) < .03 and (plan.lam[alone]==1).all() and plan.mix(x)[alone].equal(x[alone])
    kinds = {MixUp(1., p=.5, per_batch=True).draw(x[:8]).k for _ in range(20)}
    assert kinds=={1,2}

# By turns

def by_hand(plan, y, c):
    "Each place's classes with their weights, sample by sample"
    t = torch.zeros(len(plan.pairs), *y.shape[1:], c)
    def one(j): return F.one_hot(y[j], c).float()
    for rows,part in plan.parts:
        for i,(r,js) in enumerate(zip(rows, part.pairs)):
            ws,region = part.weights.expand(part.pairs.shape)[i], part.region
            if region is not None and y.ndim>1: t[r] = torch.where(region.mask.expand(len(rows), *y.shape[1:])[i][...,None], one(js[1]), one(js[0]))
            else: t[r] = sum(w*one(j) for w,j in zip(ws, js))
    return t

@pytest.mark.parametrize('shape', [(), (7,5)], ids=name_of)
def test_the_exact_loss(shape):
    "Against probability targets, put together sample by sample"
    set_seed(1)
    x,y,pred = torch.rand(12, 3, 7, 5), torch.randint(0, 4, (12,*shape)), torch.randn(12, 4, *shape)
    plan = each(MixUp(1., k=3), CutMix(), None).draw(x)
    assert isinstance(plan, JoinedPlan)
    want = F.cross_entropy(pred, by_hand(plan, y, 4).movedim(-1, 1))
    def own(p, y, reduction='mean'): return F.cross_entropy(p, y, reduction=reduction)
    for f in nn.CrossEntropyLoss(), CrossEntropyLossFlat(axis=1), own: assert_close(MixLoss(f)(pred, y, plan=plan), want)

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.uint8], ids=name_of)
def test_each_sample_is_mixed_by_its_own_part(dtype):
    x = (torch.rand(10, 3, 9, 8)*200).to(dtype)
    for o in (x, x.contiguous(memory_format=torch.channels_last)):
        set_seed(2)
        plan,kept = each(MixUp(1.), CutMix(), ResizeMix(), None).draw(o), o.clone()
        got = plan.mix(o)
        assert got.stride()==o.stride() and got.dtype==dtype and o.equal(kept)
        for rows,part in plan.parts:
            assert_close(got[rows], part.mix(o))
            if part.k==1: assert got[rows].equal(o[rows])

def test_only_one_for_a_loss_that_cannot_be_taken_apart():
    def own(pred, y): return F.cross_entropy(pred, y)
    learn = mk_learn(class_dls(), loss_func=own, cbs=[each(MixUp(1.), MixUp(.1, k=3), None), record := Record()])
    with pytest.warns(UserWarning, match='one λ for each batch'): quiet_fit(learn, 2)
    assert all(len(b['plan'].weights)==1 for b in record.batches)

@pytest.mark.parametrize('mixer', [each(each(MixUp(.4), CutMix()), CutMix()), each(each(MixUp(.4), None), MixUp(1., k=3)), each(each(CutMix(p=.5), None), None)])
def test_nested_turns_keep_each_sample_in_its_place(mixer):
    "Also where the samples are taken in another order"
    torch.manual_seed(0)
    x,y,order = torch.rand(8, 1, 4, 4),torch.rand(8, 3),torch.tensor([5,0,7,2,1,6,3,4])
    for _ in range(40):
        plan = mixer.draw(x)
        assert plan.pairs[:,0].equal(torch.arange(8))
        some = plan.take(order)
        assert some.pairs[:,0].equal(order)
        assert_close(some.without_partner_targets((y,)).mix(y), y[order])
        assert_close(some.mix(x), plan.mix(x)[order])

def test_nested_turns_have_a_region():
    "That of each part in its rows, and nowhere else"
    x = torch.rand(64, 1, 4, 4)
    plan = each(each(CutMix(), None), None).draw(x)
    cut = (plan.mix(x+2*torch.arange(64)[:,None,None,None]).long()//2 != torch.arange(64)[:,None,None,None])[:,0]
    other = plan.idx!=torch.arange(64)
    assert cut.any() and plan.region.mask[other].equal(cut[other])

def test_cutmixup():
    regions = [CutMixUp(cut_p=p).draw(torch.rand(4, 1, 5, 5)).region for p in (0., 1.)]
    assert regions[0] is None and isinstance(regions[1], Boxes)
    assert CutMixUp(cut_p=SchedLin(0, 1)).hyper_parameters(.25)=={'p0':.75, 'p1':.25}

def test_in_a_learner_with_three_in_each_mixture():
    learn = quiet_fit(mk_learn(class_dls(), cbs=[MixUp(.4, k=3), record := Record()]))
    def mean_of(plan, x): return torch.stack([sum(w*x[j] for w,j in zip(ws, js)) for ws,js in zip(plan.weights.double(), plan.pairs)])
    for b in record.batches:
        assert_close(b['mixed'][0].double(), mean_of(b['plan'], b['xb'][0].double()), rtol=1e-5, atol=1e-5)
        t = mean_of(b['plan'], F.one_hot(b['yb'][0], 4).double()).float()
        assert_close(b['loss'], F.cross_entropy(b['pred'].detach(), t))

# Schedules

def fitted(mixer, n_epoch=4, **kwargs):
    learn = mk_learn(class_dls(), cbs=[mixer, record := Record()])
    return quiet_fit(learn, n_epoch, **kwargs),record

@pytest.mark.parametrize('sched', [SchedCos(1., .1), combine_scheds([.5,.5], [SchedNo(.4, .4), SchedLin(.4, 0)]), lambda pct: torch.tensor(1-pct)])
def test_alpha_follows_its_schedule(sched):
    learn,record = fitted(MixUp(sched))
    hps = learn.recorder.hps['alpha']
    assert len(hps)==16
    for i,a in enumerate(hps): assert a==pytest.approx(float(sched(i/16)), abs=1e-6)
    assert len({b['plan'].lam[0].item() for b in record.batches})>8

def test_lam_is_drawn_by_the_present_alpha():
    mixer = MixUp(lambda pct: 50. if pct<.5 else .01)
    def spread(pct): return mixer.draw(torch.rand(4000, 1), pct=pct).lam.mean().item()
    assert spread(0.)<.56 and spread(.9)>.98 and spread(.1)<.56
    mixer.alpha = .01   # a callback may set it
    assert spread(0.)>.98

def test_until():
    for mixer in MixUp(1., until=.5), each(MixUp(1.), MixUp(.4, k=3), until=.5), MixUp(1., p=SchedNo(1., 1.), until=.5):
        learn,record = fitted(mixer)
        assert [not b['mixed'][0].equal(b['xb'][0]) for b in record.batches]==[True]*8+[False]*8
        for b in record.batches[8:]: assert b['loss']==F.cross_entropy(b['pred'], b['yb'][0])
        assert learn.recorder.hps['p']==[1.]*8+[0.]*8

def test_weights_follow_theirs():
    learn,_ = fitted(OneOf(MixUp(SchedLin(1., .5)), None, p=[SchedLin(1, 0), SchedLin(0, 2)]))
    pct,hps = np.arange(16)/16,learn.recorder.hps
    assert_close(hps['p0'], list((1-pct)/(1-pct+2*pct)))
    assert_close(hps['alpha0'], list(1-.5*pct))
    assert {'p0','p1','alpha0'} <= set(hps)

class Rows(list):
    def __call__(self, row): self.append(list(row))

def test_recorded_plotted_and_logged():
    learn = mk_learn(class_dls(), cbs=MixUp(SchedLin(1., 0.), until=.75), metrics=[])
    learn.logger = rows = Rows()
    learn.fit_one_cycle(4)
    names = list(learn.recorder.metric_names)
    assert names==['epoch','train_loss','valid_loss','alpha','p','time'] and set(learn.recorder.hps)=={'lr','mom','p','alpha'}
    assert [r[names.index('p')] for r in rows]==[1.,1.,1.,0.] and rows[-1][names.index('alpha')]==learn.recorder.hps['alpha'][-1]==1-15/16
    learn.recorder.plot_sched()
    learn.fit(1)
    assert len(learn.recorder.hps['alpha'])==4 and not len(learn.metrics)
    assert len(learn.validate())==1

def test_set_seed_repeats_scheduled_turns():
    mixer = OneOf(MixUp(SchedCos(1., .1)), MixUp(.2, k=3), None, per_batch=False, p=[SchedLin(1, 0), .5, SchedLin(0, 1)])
    runs = []
    for _ in range(2):
        learn = mk_learn(class_dls())
        set_seed(3)
        quiet_fit(learn, 2, cbs=[mixer, record := Record()])
        runs.append([b['plan'].weights for b in record.batches])
    assert all(a.equal(b) for a,b in zip(*runs))

@pytest.mark.parametrize('copied', [lambda o: pickle.loads(pickle.dumps(o)), deepcopy], ids=['pickle','deepcopy'])
def test_schedules_go_into_a_file(copied):
    "One that cannot be pickled, such as fastai's own combination, as a table"
    sched = combine_scheds([.5,.5], [SchedNo(.4, .4), SchedLin(.4, 0)])
    for m in OneOf(MixUp(sched), None, p=[lambda pct: 1+pct, 1]), MixUp(sched, until=.7), OneOf(MixUp(SchedCos(1., .1)), None, p=[SchedLin(1, 0), 1], until=.9):
        other = copied(m)
        for pct in (0., .31, .5, .7, .731, 1.): assert m.hyper_parameters(pct)==pytest.approx(other.hyper_parameters(pct), abs=1e-3)
        quiet_fit(mk_learn(class_dls(), cbs=other))

# Refusals

@pytest.mark.parametrize('for_this_fit', [False,True])
def test_columns_go_with_the_fit(for_this_fit):
    class Stop(Callback):
        def after_backward(self): raise KeyboardInterrupt
    mixer = MixUp(SchedLin(1., 0.))
    learn = mk_learn(class_dls(), cbs=None if for_this_fit else mixer)
    learn.logger = Rows()
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[mixer]*for_this_fit + [Stop()])
    quiet_fit(learn)   # the next fit puts all back
    assert len(learn.validate())==1 and not len(learn.metrics)

def bad_partners(xb, yb, rng): return torch.full((len(xb[0]),), 99)

@pytest.mark.parametrize('make', [lambda a: MixUp(a, partners=bad_partners), lambda a: CutMix(a), lambda a: ManifoldMixUp(a, layers='nowhere'),
    lambda a: MixUp(a, partners=SecondLoader([])), lambda a: MixUp(a, partners=SecondLoader([(torch.rand(4, 7), torch.zeros(4).long())]))])
@pytest.mark.parametrize('for_this_fit', [False,True])
def test_a_refusal_leaves_the_learner_as_it_was(make, for_this_fit):
    "At once, not only when the next event comes"
    mixer = make(SchedLin(1., 0.))
    learn = mk_learn(class_dls(), cbs=None if for_this_fit else mixer, metrics=[accuracy])
    learn.logger = Rows()
    own,weights = learn.loss_func,[p.clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError): learn.fit(1, cbs=[mixer]*for_this_fit)
    assert learn.loss_func is own and learn.metrics.attrgot('name')==['accuracy']
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())
    assert all(map(torch.equal, weights, learn.model.parameters()))

@pytest.mark.parametrize('alpha', [-.001, float('nan'), float('inf'), '0.4', None], ids=name_of)
@pytest.mark.parametrize('cls', [MixUp, CutMix])
def test_bad_alpha(cls, alpha):
    with pytest.raises(ValueError, match=f'alpha.*{alpha!r}'): cls(alpha)

@pytest.mark.parametrize('make,error,what', [
    (lambda: MixUp(SchedLin(.4, -.1)), ValueError, 'schedule of alpha returns -0'), (lambda: MixUp(lambda pct: 'a'), ValueError, "alpha returns 'a'"),
    (lambda: MixUp(p=1.5), ValueError, 'p must be a fraction.*1.5'), (lambda: CutMix(p=SchedLin(1, -1)), ValueError, 'schedule of p returns -0'),
    (lambda: MixUp(until=None), ValueError, 'until must be a fraction'), (lambda: OneOf(MixUp(), CutMix(), p=[0,0]), ValueError, 'not only zeros.*0, 0'),
    (lambda: OneOf(MixUp(), CutMix(), p=[1]), ValueError, 'each of the 2 mixers'), (lambda: OneOf(MixUp(), None, p=[SchedLin(1,0), 0]), ValueError, 'schedule of p.*100 %.*0'),
    (lambda: OneOf(MixUp(), MixUp(1.), p=[float('nan')]*2), ValueError, 'nan'), (lambda: CutMixUp(cut_p=2), ValueError, 'cut_p must be'),
    (lambda: OneOf(), ValueError, 'OneOf takes mixers'), (lambda: MixUp(.4, k=1), ValueError, 'k, the samples in each mixture, must be an integer of at least 2'), (lambda: MixUp(.4, k=2.5), ValueError, 'k, .* must be'),
    (lambda: CutMix(min_side=.5, max_side=.2), ValueError, 'min_side'), (lambda: FMix(decay=-1), ValueError, 'decay'), (lambda: GridMix(cells=0), ValueError, 'cells'),
    (lambda: OneOf(MixUp(partners=same_class), CutMix()), ValueError, 'has partners=.*pass it to OneOf'), (lambda: OneOf(MixUp(y_int=False)), ValueError, 'has y_int=False'),
    (lambda: OneOf(MixUp(soft=True)), ValueError, 'has soft=True'), (lambda: OneOf(ManifoldMixUp(), None), ValueError, 'behind hidden layers'),
    (lambda: OneOf([MixUp(), CutMix()]), TypeError, 'one by one.* is a list'), (lambda: OneOf(MixUp, CutMix), TypeError, 'is a type'),
    (lambda: OneOf(FastaiMixUp(.4)), TypeError, 'import fastmix after fastai'), (lambda: OneOf(MixUp(), CutMix(), p=.5), TypeError, 'a weight for each of the 2 mixers'),
    (lambda: MixUp(.4, 3), TypeError, 'per_batch must be True or False, but it is 3'), (lambda: SaliencyMix(saliency=3), TypeError, 'saliency must be a function'),
    (lambda: MixUp(partners=lambda x: x), TypeError, 'called as partners.xb, yb, rng.'), (lambda: MixUp(partners='same_class'), TypeError, 'it is a str'),
    (lambda: MixUp(partners=lambda xb,yb,rng: None).draw(torch.rand(4, 2)), ValueError, 'returned a NoneType'),
    (lambda: MixUp(partners=SecondLoader([])).draw(torch.rand(4, 2)), ValueError, 'append_partners'),
    (lambda: RegionMix(1.).draw(torch.rand(4, 1, 2, 2)), NotImplementedError, r'RegionMix must define region\(lam, size, rng\).*as CutMix does'),
    (lambda: CutMix().draw(torch.rand(4, 2)), ValueError, 'no place to cut a box from'), (lambda: CutMixUp(p=.5), TypeError, 'has cut_p.* not p=0.5'),
    (lambda: CutMix(spatial_dims=0), ValueError, 'spatial_dims must be an integer'), (lambda: MixUp(fold='no'), TypeError, "fold must be True or False, but it is 'no'"),
    (lambda: SaliencyMix(saliency=lambda x: x).draw(torch.rand(4, 1, 2, 2)), ValueError, 'saliency must return a map')])
def test_each_mistake_has_its_sentence(make, error, what):
    with pytest.raises(error, match=what): make()

@pytest.mark.parametrize('make,text', [(lambda: MixUp(.4), 'MixUp(0.4)'), (lambda: MixUp(1., k=3, p=.5), 'MixUp(1.0, k=3, p=0.5)'), (lambda: CutMix(), 'CutMix(1.0)'),
    (lambda: MixUp(partners=derange, y_int=True), 'MixUp(0.4, y_int=True, partners=derange)'), (lambda: ResizeMix(max_side=.5), 'ResizeMix(max_side=0.5)'),
    (lambda: OneOf(MixUp(), None, p=[1,2]), 'OneOf(MixUp(0.4), None, p=[1, 2])'), (lambda: CutMixUp(), 'CutMixUp(0.4, 1.0, 0.5)'), (lambda: ManifoldMixUp(1.), 'ManifoldMixUp(1.0)')])
def test_repr_says_how_it_was_configured(make, text): assert repr(make())==text

# Which dimensions are places
cuts = [*(o(spatial_dims=2) for o in (CutMix, ResizeMix, SaliencyMix, FMix, GridMix)), CutMixUp(cut_p=1., spatial_dims=2),
    OneOf(CutMix(spatial_dims=2), None, per_batch=False)]

@pytest.mark.parametrize('shape', [(5,3,12,10), (12,10), (3,12,10)], ids=['film','gray','image'])
@pytest.mark.parametrize('mixer', cuts, ids=name_of)
def test_a_cut_is_the_same_in_all_frames(mixer, shape):
    "The fraction of each frame that is cut is the weight of the label"
    x = torch.arange(6.).view(-1, *[1]*len(shape)).expand(6, *shape)
    plan = mixer.draw(x)
    mixed = plan.mix(x).reshape(6, -1, 12, 10)
    assert plan.region.size==(12,10) and (mixed==mixed[:,:1]).all()
    torch.testing.assert_close(mixed.mean((1,2,3)), plan.lam*torch.arange(6.) + (1-plan.lam)*plan.idx, atol=1e-4, rtol=0)

@pytest.mark.parametrize('mixer', [CutMix(), ResizeMix(), SaliencyMix(), FMix(), GridMix(), CutMixUp(cut_p=1.)], ids=name_of)
def test_channels_last_is_refused(mixer):
    for shape in (4,12,10,3),(4,7,3,12,10):
        with pytest.raises(ValueError, match=r'(channels last|frames of images).*CutMix\(spatial_dims=2\)'): mixer.draw(torch.rand(shape))

@pytest.mark.parametrize('mixer', [*(o(p=.5) for o in (MixUp, CutMix, SaliencyMix, FMix, GridMix, ResizeMix)), OneOf(MixUp(), CutMix(), None, per_batch=False),
    CutMixUp(per_batch=False), MixUp(k=3, p=.5)], ids=name_of)
def test_a_batch_of_no_samples(mixer):
    x = torch.rand(0, 3, 8, 8)
    assert mixer.draw(x).mix(x).shape==x.shape
