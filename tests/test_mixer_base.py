"What all mixers share: hyper-parameters and their schedules, partners, samples that stay as they are, and plans drawn ahead"
import pickle
from copy import deepcopy
import numpy as np, pytest, torch
from fastai.callback.schedule import SchedCos, SchedLin, SchedNo, combine_scheds
from torch import tensor
from fastmix.core import check_alpha, draw_lam, private_rng
from fastmix.mixer_base import Draw, Mixer, check_schedule, _picklable, value_at
from fastmix.partners import SecondLoader, derange, same_class
from fastmix.plan import Plan
from helpers import name_of

class Blends(Mixer):
    "A mixer of one's own. It records for how many batches it draws"
    scheduled,n_ahead = ('alpha','p'),4096
    def __init__(self, alpha=1., **kwargs):
        super().__init__(**kwargs)
        self.alpha,self.asked = check_schedule('alpha', alpha, check_alpha),[]

    def make_plan(self, d):
        self.asked.append(d.m)
        return Plan.of(d.idx(), draw_lam(self.n_lam(d), value_at(self.alpha, d.pct), d.rng), n=d.n)

x,y = torch.rand(8, 3, 4, 4),torch.arange(8)%2
falls = combine_scheds([.5,.5], [SchedNo(.4, .4), SchedLin(.4, 0)])

@pytest.mark.parametrize('value,want', [(.4,.4), (SchedLin(1., 0.),.25), (lambda pct: tensor(pct),.75),
    (lambda pct: np.float64(pct),.75), (falls,.2)])
def test_value_at(value, want):
    got = value_at(value, .75)
    assert type(got) is float and got==pytest.approx(want)

@pytest.mark.parametrize('alpha,what', [(lambda pct: float('nan'), 'alpha returns nan at 0 %'),
    (SchedLin(.5, -.5), r'schedule of alpha returns -0.01.* at 51 % of the training: alpha must be a finite number'),
    (lambda pct: 'a', "alpha returns 'a' at 0 %"), (-1, 'alpha must be .* it is -1')])
def test_a_bad_value_is_found_before_the_training(alpha, what):
    with pytest.raises(ValueError, match=what): Blends(alpha)

@pytest.mark.parametrize('options,what', [(dict(p=1.5), 'p must be a fraction .* it is 1.5'), (dict(p='1'), 'p must be'),
    (dict(until=None), 'until must be'), (dict(p=SchedLin(1, -1)), 'schedule of p returns -0.02'),
    (dict(until=-1), 'until must be a fraction between 0 and 1, but it is -1')])
def test_bad_fractions(options, what):
    with pytest.raises(ValueError, match=what): Blends(**options)

def no_args(): pass
@pytest.mark.parametrize('options,what', [(dict(per_batch=3), 'per_batch must be True or False, but it is 3'),
    (dict(partners='derange'), 'it is a str'), (dict(partners=no_args), 'called as partners.xb, yb, rng., but no_args cannot be'),
    (dict(partners=[x]), 'SecondLoader.*it is a list')])
def test_arguments_of_the_wrong_kind(options, what):
    with pytest.raises(TypeError, match=what): Blends(**options)

def test_a_class_without_make_plan():
    with pytest.raises(NotImplementedError, match='Mixer must define make_plan'): Mixer().draw(x)

def test_partners_see_the_batch():
    seen = []
    def own(xb, yb, rng): return seen.append((xb, yb, rng)) or torch.arange(8).flip(0)
    mixer = Blends(partners=own)
    plan = mixer.draw((x[:,0,0],x), (y,y+1))
    (xb,yb,rng), = seen
    assert plan.idx.equal(torch.arange(8).flip(0)) and xb[1] is x and yb[0] is y and len(yb)==2 and rng is mixer.rng
    for _ in range(20): assert y[Blends(partners=same_class).draw(x, y).idx].equal(y)
    with pytest.raises(ValueError, match='from 1 to 8'): Blends(partners=lambda xb,yb,rng: torch.arange(1, 9)).draw(x)

def test_partners_after_the_batch():
    plan = Blends().draw(x, bs=3)
    assert plan.n==8 and len(plan.pairs)==3 and (plan.idx>=3).all()
    with pytest.raises(ValueError, match='append_partners'): Blends(partners=SecondLoader([])).draw(x)

def test_regions_are_those_of_the_input_of_highest_rank(): assert Draw((x[:,0,0],x,y), (), 8, 0., private_rng()).x is x

def test_one_lam():
    assert len(Blends(per_batch=True).draw(x).lam)==len(Blends().draw(x, per_batch=True).lam)==1
    assert len(Blends().draw(x).lam)==8

@pytest.mark.parametrize('per_batch', [False,True])
def test_p_and_until(per_batch):
    "A fraction of the samples is mixed, or of the batches; none late in the training"
    mixer = Blends(p=SchedLin(1., .5), until=.8, per_batch=per_batch)
    def fraction(pct): return torch.stack([(mixer.draw(x, pct=pct).lam<1).float().mean() for _ in range(400)]).mean().item()
    assert [fraction(pct) for pct in (0., .4, .79, .8, 1.)]==pytest.approx([1., .8, .605, 0., 0.], abs=.07)
    unmixed = mixer.draw(x, pct=.9)
    assert unmixed.k==1 and unmixed.mix(x) is x
    if per_batch: assert {len(mixer.draw(x, pct=.5).lam) for _ in range(20)}=={1}

def test_lam_is_drawn_by_the_present_alpha():
    mixer = Blends(lambda pct: 50. if pct<.5 else .01)
    means = [mixer.draw(torch.rand(4000, 1), pct=pct).lam.mean().item() for pct in (0., .9, .1)]
    assert means[0]<.56 and means[1]>.98 and means[2]<.56

def test_hyper_parameters_are_the_scheduled_ones():
    assert Blends(.4, p=.5).hyper_parameters(.5)=={}
    assert Blends(SchedLin(1., 0.), p=.5, until=.75).hyper_parameters(.25)==dict(alpha=.75, p=.5)
    assert Blends(SchedLin(1., 0.), until=.75).hyper_parameters(.75)==dict(alpha=.25, p=0.)
    assert Blends(p=SchedLin(1., 0.)).hyper_parameters(.25)==dict(p=.75)

@pytest.mark.parametrize('copied', [lambda o: pickle.loads(pickle.dumps(o)), deepcopy], ids=['pickle','deepcopy'])
def test_copies(copied):
    "A schedule that cannot be pickled goes as a table, plans drawn ahead stay behind, and the random generator goes on"
    a = Blends(falls, p=lambda pct: 1-pct/2, until=.95)
    b = copied(a)
    for pct in (0., .31, .5, .7, .731, .94, 1.): assert a.hyper_parameters(pct)==pytest.approx(b.hyper_parameters(pct), abs=1e-3)
    a = Blends()
    for _ in range(5): a.draw(x)
    b = copied(a)
    assert a.ahead and b.ahead is None and a.rng is not b.rng
    a.set_rng(a.rng)
    assert a.draw(x).lam.equal(b.draw(x).lam)

def test_portable():
    cos = SchedCos(1., 0.)
    assert _picklable(.4)==.4 and _picklable(cos) is cos
    number,table = _picklable([.3, lambda pct: pct**2])
    assert number==.3 and pickle.loads(pickle.dumps(table))(.5)==.25

@pytest.mark.parametrize('mixer,text', [(Blends(.4), 'Blends(0.4)'), (Mixer(), 'Mixer(1.0)'),
    (Mixer(.5, partners=derange, per_batch=True), 'Mixer(0.5, partners=derange, per_batch=True)')])
def test_repr(mixer, text): assert repr(mixer)==text

# Plans drawn ahead

def test_plans_drawn_ahead_are_as_good_as_others():
    "Partners are a permutation of each batch, each as likely as another; λ is of its distribution, and none comes twice"
    mixer,counts,lams = Blends(2., p=.75),torch.zeros(8, 8),[]
    for _ in range(3000):
        plan = mixer.draw(x)
        assert plan.n==8 and plan.pairs[:,0].equal(torch.arange(8))
        if plan.k==1: continue
        mixed = plan.idx[plan.lam<1]
        assert len(mixed)==len(set(mixed.tolist())) and mixed.max()<8
        counts[torch.arange(8)[plan.lam<1],mixed] += 1
        lams.append(plan.lam[plan.lam<1])
    lams = torch.cat(lams)
    assert mixer.asked[:9]==[1,2,4,8,16,32,64,128,256] and len(mixer.asked)<20
    assert (counts/3000-.75/8).abs().max() < .025 and len(lams)/24000==pytest.approx(.75, abs=.02)
    want = draw_lam(10**5, 2., private_rng()).mean().item()
    assert len(lams.unique())>.99*len(lams) and lams.mean().item()==pytest.approx(want, abs=.005)

def test_what_was_drawn_ahead_is_forgotten():
    "For batches of another kind, and whenever a hyper-parameter or the generator is set"
    mixer = Blends()
    def fresh(x=x):
        n = len(mixer.asked)
        mixer.draw(x)
        return len(mixer.asked)>n and mixer.asked[-1]==1
    for _ in range(4): mixer.draw(x)
    assert not fresh() and fresh(x[:5]) and not [fresh(x[:5]), fresh(x[:5])][1] and fresh() and fresh(x[...,:2])
    for name,value in dict(alpha=.2, p=.9, rng=private_rng()).items():
        for _ in range(4): mixer.draw(x)
        setattr(mixer, name, value)
        assert fresh()
    for _ in range(4): mixer.draw(x)
    with torch.inference_mode(): assert fresh()
    for _ in range(4): mixer.draw(x)
    mixer.set_rng(private_rng())
    assert fresh()

@pytest.mark.parametrize('options', [dict(partners=derange), dict(until=.5), dict(alpha=SchedLin(1., .5)),
    dict(p=SchedLin(1., .5)), dict(per_batch=True)], ids=name_of)
def test_what_depends_on_the_batch_is_drawn_for_it(options):
    mixer = Blends(**options)
    for _ in range(6): mixer.draw(x)
    assert set(mixer.asked)=={1}

def test_one_lam_is_drawn_for_each_batch_be_it_of_one_sample():
    for mixer in Blends(per_batch=True),Blends():
        lams = [mixer.draw(torch.rand(1, 3), per_batch=True).lam.item() for _ in range(50)]
        assert len(set(lams))==50

def test_large_batches_and_empty_ones():
    mixer = Blends()
    for _ in range(3): mixer.draw(torch.rand(3000, 1))
    assert mixer.asked==[1,1,1]
    for n in (2048, 2048, 2048, 0, 1): assert len(mixer.draw(torch.rand(n, 1)).pairs)==n
    assert max(mixer.asked)==2

class Marked(Plan): pass
class Marks(Blends):
    def make_plan(self, d): return Marked.of(super().make_plan(d).idx, torch.ones(1), n=d.n)

def test_a_subclass_draws_for_each_batch():
    "Its plans may depend on the batch, or be of a class of their own"
    mixer = Marks()
    assert {type(mixer.draw(x)) for _ in range(5)}=={Marked} and set(mixer.asked)=={1}

def test_the_same_stream_draws_the_same_plans():
    a,b = Blends(),Blends()
    for m in a,b: m.set_rng(np.random.default_rng(3))
    plans = [[m.draw(x) for _ in range(20)] for m in (a,b)]
    assert all(p.lam.equal(q.lam) and p.idx.equal(q.idx) for p,q in zip(*plans))
