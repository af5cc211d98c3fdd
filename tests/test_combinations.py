"Mixers by turns, batch by batch or sample by sample, and hyper-parameters that change in the course of training"
import pickle
from copy import deepcopy
from functools import partial
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp as FastaiMixUp
from fastai.callback.schedule import SchedCos, SchedLin, SchedNo, combine_scheds
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from torch import nn
from torch.testing import assert_close
from fastmix.callback import CutMix, CutMixUp, FMix, GridMix, MixUp, OneOf, ResizeMix
from fastmix.check import check_losses, check_mix
from fastmix.core import BlendPlan, CutPlan, JoinedPlan, Plan, same_class
from fastmix.data import SecondLoader
from fastmix.loss import MixLoss
from fastmix.manifold import ManifoldMixUp
from fastmix.mixes import Blend, Choice, Cut, Mix, ResizeCut, Sometimes
from helpers import Record, class_dls, mk_learn, quiet_fit

each = partial(OneOf, per_batch=False)
mixers = [each(MixUp(.4), CutMix()), each(MixUp(1., k=3), CutMix(per_batch=True), ResizeMix(), None), each(MixUp(.4), None, p=[1,3]), MixUp(1., p=.5),
    CutMix(p=.5), MixUp(.4, per_batch=True, p=.5), each(each(MixUp(1.), CutMix()), each(GridMix(), MixUp(.4, k=4), FMix(p=.5))), CutMixUp(per_batch=False),
    CutMixUp(cut_p=.9), CutMix(until=.5), OneOf(MixUp(p=.3), None)]

@pytest.mark.parametrize('size', [(16,16), (1,9), (20,), (4,5,6)], ids=str)
@pytest.mark.parametrize('kind', check_losses)
@pytest.mark.parametrize('i', range(len(mixers)))
def test_every_mixer_tells_the_truth(i, kind, size): assert check_mix(mixers[i], kind, size, n_batches=4) < 1e-6

def by_hand(plan, y, c):
    "Each place's classes with their shares, sample by sample"
    t = torch.zeros(len(plan.pairs), *y.shape[1:], c)
    def one(j): return nn.functional.one_hot(y[j], c).float()
    for rows,part in plan.parts:
        for i,(r,js) in enumerate(zip(rows, part.pairs)):
            ws,region = part.shares.expand(part.pairs.shape)[i], part.region
            if region is not None and y.ndim>1: t[r] = torch.where(region.expand(len(rows), *y.shape[1:])[i][...,None], one(js[1]), one(js[0]))
            elif type(part) is Plan: t[r] = one(r)
            else: t[r] = sum(w*one(j) for w,j in zip(ws, js))
    return t

@pytest.mark.parametrize('shape', [(), (7,5)], ids=str)
@pytest.mark.parametrize('seed', range(4))
def test_the_exact_loss(shape, seed):
    "Against probability targets, put together sample by sample"
    set_seed(seed)
    x,y,pred = torch.rand(12, 3, 7, 5), torch.randint(0, 4, (12,*shape)), torch.randn(12, 4, *shape)
    plan = Choice([Blend(1., k=3), Cut(), Mix()], per_batch=False).draw(x)
    assert isinstance(plan, JoinedPlan)
    t = by_hand(plan, y, 4).movedim(-1, 1)
    assert_close(MixLoss(nn.CrossEntropyLoss())(pred, y, plan=plan), nn.functional.cross_entropy(pred, t))
    assert_close(MixLoss(CrossEntropyLossFlat(axis=1))(pred, y, plan=plan), nn.functional.cross_entropy(pred, t))
    def own(p, y, reduction='mean'): return nn.functional.cross_entropy(p, y, reduction=reduction)
    assert_close(MixLoss(own)(pred, y, plan=plan), nn.functional.cross_entropy(pred, t))

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_each_sample_is_mixed_by_its_own_part(dtype):
    x = (torch.rand(10, 3, 9, 8)*200).to(dtype)
    for o in (x, x.contiguous(memory_format=torch.channels_last)):
        plan,kept = Choice([Blend(1.), Cut(), ResizeCut(), Mix()], per_batch=False).draw(o), o.clone()
        got = plan.mix(o)
        assert got.stride()==o.stride() and got.dtype==dtype and o.equal(kept)
        for rows,part in plan.parts:
            assert_close(got[rows], part.mix(o))
            if type(part) is Plan: assert got[rows].equal(o[rows])

def test_shares_of_choices():
    mix,counts = Choice([Blend(.4), Cut(), Mix()], p=[1,2,5], per_batch=False), torch.zeros(3)
    for _ in range(50):
        for rows,part in getattr(mix.draw(torch.rand(40, 1, 6, 6)), 'parts', []): counts[[BlendPlan,CutPlan,Plan].index(type(part))] += len(rows)
    assert (counts/2000-torch.tensor([1,2,5])/8).abs().max() < .04

def test_only_one_for_a_loss_that_can_not_be_taken_apart():
    def own(pred, y): return nn.functional.cross_entropy(pred, y)
    learn = mk_learn(class_dls(), loss_func=own, cbs=[each(MixUp(1.), MixUp(.1, k=3), None), record := Record()])
    with pytest.warns(UserWarning, match='one λ for each batch'): learn.fit(2)
    assert all(len(b['plan'].shares)==1 for b in record.batches)

# Schedules

def alphas(mixer, n_epoch=4, **kwargs):
    learn = mk_learn(class_dls(), cbs=[mixer, record := Record()])
    quiet_fit(learn, n_epoch, **kwargs)
    return learn,record

@pytest.mark.parametrize('sched', [SchedCos(1., .1), SchedLin(.1, 2.), combine_scheds([.5,.5], [SchedNo(.4, .4), SchedLin(.4, 0)]), lambda pct: 1-pct,
    lambda pct: torch.tensor(pct), lambda pct: np.float64(pct)])
def test_alpha_follows_its_schedule(sched):
    mixer = MixUp(sched)
    seen = []
    class See(Callback):
        order = 1
        def before_batch(self):
            if self.training: seen.append((self.pct_train, mixer.mix.alpha))
    learn,record = alphas(mixer, cbs=See())
    assert len(seen)==16 and mixer.hps['alpha']==[a for _,a in seen]
    for pct,a in seen: assert a==pytest.approx(float(sched(pct)))
    assert len({b['plan'].lam[0].item() for b in record.batches})>8

def test_lam_is_drawn_by_the_present_alpha():
    mix = Blend(lambda pct: 50. if pct<.5 else .01)
    def spread(pct): return [mix.at(pct), mix.draw(torch.rand(4000, 1)).lam.mean().item()][1]
    assert spread(0.)<.56 and spread(.9)>.98 and spread(.1)<.56

def test_until():
    for mixer in MixUp(1., until=.5), OneOf(MixUp(1.), MixUp(.4, k=3), until=.5, per_batch=False), MixUp(1., p=SchedNo(1., 1.), until=.5):
        learn,record = alphas(mixer)
        mixed = [not b['mixed'][0].equal(b['xb'][0]) for b in record.batches]
        assert mixed==[True]*8+[False]*8
        for b in record.batches[8:]: assert b['loss']==nn.functional.cross_entropy(b['pred'], b['yb'][0])
        assert mixer.hps['p']==[1.]*8+[0.]*8

def test_weights_follow_theirs():
    mixer = OneOf(MixUp(SchedLin(1., .5)), None, p=[SchedLin(1, 0), SchedLin(0, 2)])
    learn,record = alphas(mixer)
    pct = np.arange(16)/16
    assert_close(mixer.hps['p0'], list((1-pct)/(1-pct+2*pct)))
    assert_close(mixer.hps['alpha0'], list(1-.5*pct))
    assert set(mixer.hps)=={'p0','p1','alpha0'}

def test_recorded_plotted_and_logged(capsys):
    learn = mk_learn(class_dls(), cbs=MixUp(SchedLin(1., 0.), until=.75), metrics=[])
    learn.logger = rows = Rows()
    learn.fit_one_cycle(4)
    names = list(learn.recorder.metric_names)
    assert names==['epoch','train_loss','valid_loss','p','alpha','time'] and set(learn.recorder.hps)=={'lr','mom','p','alpha'}
    assert [r[names.index('p')] for r in rows]==[1.,1.,1.,0.] and rows[-1][names.index('alpha')]==learn.recorder.hps['alpha'][-1]==1-15/16
    learn.recorder.plot_sched()
    learn.fit(1)
    assert len(learn.recorder.hps['alpha'])==4 and not len(learn.metrics)
    assert len(learn.validate())==1

class Rows(list):
    def __call__(self, row): self.append(list(row))

@pytest.mark.parametrize('for_this_fit', [False,True])
def test_columns_go_with_the_fit(for_this_fit):
    class Stop(Callback):
        def after_backward(self): raise KeyboardInterrupt
    mixer = MixUp(SchedLin(1., 0.))
    learn = mk_learn(class_dls(), cbs=None if for_this_fit else mixer)
    learn.logger = Rows()
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[mixer]*for_this_fit + [Stop()])
    assert len(learn.validate())==1 and not len(learn.metrics)

@pytest.mark.parametrize('make,what', [(lambda: MixUp(SchedLin(.4, -.1)), 'schedule of alpha gives -0'), (lambda: MixUp(lambda pct: float('nan')), 'alpha gives nan'),
    (lambda: MixUp(lambda pct: 'a'), "alpha gives 'a'"), (lambda: MixUp(p=1.5), 'p must be a share.*1.5'), (lambda: MixUp(p='1'), 'p must be a share'),
    (lambda: CutMix(p=SchedLin(1, -1)), 'schedule of p gives -0'), (lambda: MixUp(until=-1), 'until must be a share'), (lambda: MixUp(until=None), 'until must'),
    (lambda: OneOf(MixUp(), CutMix(), p=[0,0]), 'not only zeros.*0, 0'), (lambda: OneOf(MixUp(), CutMix(), p=[1]), 'each of the 2 mixes'),
    (lambda: OneOf(MixUp(), CutMix(), p=[1,-1]), 'at least 0'), (lambda: OneOf(MixUp(), None, p=[SchedLin(1,0), 0]), 'schedule of p gives .0.*, 0. at 100%'),
    (lambda: CutMixUp(cut_p=2), 'cut_p must be'), (lambda: OneOf(), 'OneOf takes mixers')])
def test_bad_input_is_named_before_training(make, what):
    with pytest.raises(ValueError, match=what): make()

def test_set_seed_repeats_a_scheduled_choice():
    mixer = OneOf(MixUp(SchedCos(1., .1)), MixUp(.2, k=3), None, per_batch=False, p=[SchedLin(1, 0), .5, SchedLin(0, 1)])
    runs = []
    for _ in range(2):
        learn = mk_learn(class_dls())
        set_seed(3)
        quiet_fit(learn, 2, cbs=[mixer, record := Record()])
        runs.append([b['plan'].shares for b in record.batches])
    assert all(a.equal(b) for a,b in zip(*runs))

def test_pickles():
    mixer = pickle.loads(pickle.dumps(OneOf(MixUp(SchedCos(1., .1)), None, p=[SchedLin(1, 0), 1], until=.9)))
    alphas(mixer, 1)
    assert len(mixer.hps['alpha0'])==4

@pytest.mark.parametrize('copied', [lambda o: pickle.loads(pickle.dumps(o)), deepcopy])
def test_a_schedule_that_does_not_pickle_goes_as_a_table(copied):
    "Such as fastai's own combination, which an exported learner would stumble over"
    sched = combine_scheds([.5,.5], [SchedNo(.4, .4), SchedLin(.4, 0)])
    mix,same = Choice([Blend(sched), Mix()], p=[lambda pct: 1+pct, 1]), Sometimes(Blend(sched), until=.7)
    for a,b in (mix,copied(mix)), (same,copied(same)):
        for pct in (0., .31, .5, .69, .7, .731, 1.): assert a.at(pct)==pytest.approx(b.at(pct), abs=1e-3)

def test_cutmixup():
    kinds = [type(CutMixUp(cut_p=p).mix.draw(torch.rand(4, 1, 5, 5))) for p in (0., 1.)]
    assert kinds==[BlendPlan,CutPlan]
    m = CutMixUp(cut_p=SchedLin(0, 1)).mix
    assert m.at(.25)=={'p0':.75, 'p1':.25}

def bad_partners(xb, yb, rng): return torch.full((len(xb[0]),), 99)

@pytest.mark.parametrize('options', [dict(partners=bad_partners), dict(partners=same_class, mixer=CutMix), dict(mixer=ManifoldMixUp, layers='nowhere'),
    dict(partners=SecondLoader([])), dict(partners=SecondLoader([(torch.rand(4, 7), torch.zeros(4).long())]))], ids=lambda o: '-'.join(o))
@pytest.mark.parametrize('for_this_fit', [False,True])
def test_a_refusal_leaves_the_learner_as_it_was(options, for_this_fit):
    "At once, not only when the next event comes"
    options = dict(options)
    mixer = options.pop('mixer', MixUp)(SchedLin(1., 0.), **options)
    learn = mk_learn(class_dls(), cbs=None if for_this_fit else mixer, metrics=[accuracy])
    learn.logger = Rows()
    own,weights = learn.loss_func,[p.clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError): learn.fit(1, cbs=[mixer]*for_this_fit)
    assert learn.loss_func is own and learn.metrics.attrgot('name')==['accuracy']
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())
    assert all(map(torch.equal, weights, learn.model.parameters()))

@pytest.mark.parametrize('mixer', [each(each(MixUp(.4), CutMix()), CutMix()), each(each(MixUp(.4), None), MixUp(1., k=3)),
    each(each(each(MixUp(.4), None), CutMix()), None)])
def test_nested_choices_keep_each_sample_in_its_place(mixer):
    "Also where they are taken in another order"
    torch.manual_seed(0)
    x,y,order = torch.rand(8, 1, 4, 4),torch.rand(8, 3),torch.tensor([5,0,7,2,1,6,3,4])
    for _ in range(60):
        plan = mixer.mix.draw(x)
        assert plan.pairs[:,0].equal(torch.arange(8))
        some = plan.take(order)
        assert some.pairs[:,0].equal(order)
        assert_close(some.own_targets((y,)).mix(y), y[order])
        assert_close(some.mix(x), plan.mix(x)[order])

def test_nested_choices_have_a_region():
    "For pictures of what was pasted: that of each part in its rows, and nowhere else"
    x = torch.rand(64, 1, 4, 4)
    plan = each(each(CutMix(), None), None).mix.draw(x)
    cut = (plan.mix(x+2*torch.arange(64)[:,None,None,None]).long()//2 != torch.arange(64)[:,None,None,None])[:,0]
    own = plan.idx==torch.arange(64)
    assert cut.any() and plan.region[~own].equal(cut[~own])

@pytest.mark.parametrize('make,error,what', [
    (lambda: OneOf(MixUp(partners=same_class), CutMix()), ValueError, 'MixUp has partners=.*give it to OneOf'), (lambda: OneOf(MixUp(y_int=False)), ValueError, 'has y_int=False'),
    (lambda: OneOf(MixUp(soft=True)), ValueError, 'has soft=True'), (lambda: OneOf(ManifoldMixUp(), None), ValueError, 'behind hidden layers'),
    (lambda: OneOf([MixUp(), CutMix()]), TypeError, 'one by one.* is a list'), (lambda: OneOf(MixUp, CutMix), TypeError, 'is a type'), (lambda: OneOf(Blend(.4)), TypeError, 'is a Blend'),
    (lambda: OneOf(FastaiMixUp(.4)), TypeError, 'import fastmix after fastai'), (lambda: OneOf(), ValueError, 'but got none'),
    (lambda: OneOf(MixUp(), CutMix(), p=.5), TypeError, 'a weight for each of the 2 mixes'), (lambda: MixUp(.4, 3), TypeError, 'per_batch must be True or False, but it is 3'),
    (lambda: MixUp(partners=lambda x: x), TypeError, 'called as partners.xb, yb, rng.'), (lambda: MixUp(partners='same_class'), TypeError, 'it is a str'),
    (lambda: Blend(.4).draw(torch.rand(4, 2), partners=lambda rng: None), ValueError, 'gave a NoneType')])
def test_each_mistake_has_its_sentence(make, error, what):
    with pytest.raises(error, match=what): make()
