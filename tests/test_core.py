"The random generator, λ, weights and partners, over many draws; nests of tensors"
import math, random
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from types import SimpleNamespace
import numpy as np, pytest, scipy.stats, torch
from fastai.torch_core import set_seed
from hypothesis import given, settings, strategies as st
from fastmix.core import (check_alpha, check_fraction, draw_lam, draw_partners, draw_weights, is_categorical, is_numeric, map_tensors, private_rng,
    tensors_in, unsqueeze_as)
from helpers import name_of

rng = np.random.default_rng(0)

# The private generator

def first_draws(n=4): return [private_rng().random() for _ in range(n)]

def global_draws(): return [random.random(),random.gauss(0, 1),np.random.rand(),*np.random.randn(3),*torch.rand(2).tolist(),*torch.randn(2).tolist()]

def test_set_seed_repeats_all_streams():
    runs = []
    for seed in 1,1,2:
        set_seed(seed)
        runs.append(first_draws())
        np.random.rand()
        runs[-1] += first_draws()
    assert runs[0]==runs[1] and len({o for run in runs for o in run})==16

@pytest.mark.parametrize('before', [lambda: None, np.random.randn], ids=['even','odd'])
def test_the_global_streams_do_not_notice(before):
    "With and without a normal that NumPy keeps for its next call"
    runs = []
    for make in (lambda: None), private_rng:
        set_seed(5)
        before()
        draws = []
        for _ in range(3):
            make()
            make()
            draws += global_draws()
        runs.append(draws)
    assert runs[0]==runs[1]

def test_seeds_repeat_streams_while_numpy_keeps_a_normal():
    "With no place to count streams, repeating after a seed matters more than differing from one another"
    runs = []
    for _ in range(2):
        set_seed(5)
        np.random.randn()
        runs.append(first_draws())
    assert runs[0]==runs[1] and len({*runs[0]})==1

def test_a_restored_state_repeats_its_streams():
    set_seed(5)
    first_draws()
    state,a = np.random.get_state(),first_draws()
    np.random.set_state(state)
    assert first_draws()==a

@pytest.mark.parametrize('advance', [random.random, np.random.rand, lambda: torch.rand(1)], ids=['Python','NumPy','torch'])
def test_each_global_stream_seeds(advance):
    set_seed(5)
    a = first_draws(1)
    set_seed(5)
    advance()
    assert first_draws(1)!=a

def test_ranks_differ(monkeypatch):
    def of_rank(rank):
        set_seed(5)
        monkeypatch.setenv('RANK', rank)
        return private_rng().random()
    assert len({of_rank(o) for o in ('0','1','2')})==3 and of_rank('')==of_rank('0')

# λ and weights

@pytest.mark.parametrize('alpha', [.1, .4, 1., 8.])
def test_lam_is_beta(alpha):
    "In twenty bins, folded or not, as SciPy's distribution function says"
    n,edges = 20_000, np.linspace(0, 1, 21)
    want = n*np.diff(scipy.stats.beta(alpha, alpha).cdf(edges))
    assert scipy.stats.chisquare(np.histogram(draw_lam(n, alpha, rng, fold=False), edges)[0], want).pvalue > 1e-3
    assert scipy.stats.chisquare(np.histogram(draw_lam(n, alpha, rng), edges[10:])[0], 2*want[10:]).pvalue > 1e-3

@settings(deadline=None)
@given(st.floats(0, 1e6, exclude_min=True), st.booleans(), st.integers(1, 9))
def test_any_alpha(alpha, fold, n):
    lam = draw_lam(n, alpha, rng, fold)
    assert lam.shape==(n,) and lam.dtype==torch.float32 and ((lam>=.5*fold) & (lam<=1)).all()

@pytest.mark.parametrize('k,alpha', [(2,.4), (3,1.), (5,.1)])
def test_weights_are_dirichlet(k, alpha):
    "Mean 1/k and variance (k-1)/(k² (kα+1)); folded, they are the same ones, largest first"
    weights = draw_weights(40_000, alpha, k, rng, fold=False).double()
    assert (weights.sum(1)-1).abs().max() < 1e-6 and (weights.mean(0)-1/k).abs().max() < .01
    assert (weights.var(0)*(k*k*(k*alpha+1))/(k-1) - 1).abs().max() < .05
    a,b = (draw_weights(12, alpha, k, np.random.default_rng(1), fold) for fold in (False,True))
    assert b.equal(a.sort(-1, descending=True).values)

@pytest.mark.parametrize('bad', [-1e-9, math.nan, math.inf, '1', None, 1j], ids=name_of)
def test_bad_numbers_are_named(bad):
    with pytest.raises(ValueError, match='alpha must be a finite number .* but it is') as e: check_alpha(bad)
    assert str(e.value).endswith(repr(bad))
    with pytest.raises(ValueError, match='cut_p must be a fraction .* but it is') as e: check_fraction('cut_p', bad)
    assert str(e.value).endswith(repr(bad))

def test_good_numbers_are_floats():
    for o in 0,1,np.float32(.5),True: assert type(check_alpha(o)) is type(check_fraction('p', o)) is float
    assert check_alpha(1e6)==1e6
    with pytest.raises(ValueError): check_fraction('p', 1+1e-9)

# Partners

@pytest.mark.parametrize('n_extra', [0, 5])
def test_partners_are_uniform(n_extra):
    counts = np.zeros((5, 5))
    for _ in range(5000): counts[np.arange(5), draw_partners(5, rng, n_extra)-n_extra] += 1
    assert scipy.stats.chisquare(counts.ravel()).pvalue > 1e-3

@pytest.mark.parametrize('bs,n_extra', [(7,0), (1,0), (7,3), (3,7), (4,1)])
def test_no_partner_comes_twice_before_all_have_come(bs, n_extra):
    idx = draw_partners(bs, rng, n_extra)
    counts = idx.bincount(minlength=bs+n_extra)
    there = counts[bs:] if n_extra else counts
    assert idx.dtype==torch.int64 and there.sum()==bs and there.max()-there.min()<=1

# Tensors

def test_numbers_and_categories():
    "Bytes are numbers only where they can be images, signals or volumes"
    def kinds(o): return is_numeric(o),is_categorical(o)
    for dtype in torch.float32,torch.bfloat16,torch.float64,torch.complex64: assert kinds(torch.zeros(2, dtype=dtype))==(True,False)
    for dtype in torch.int8,torch.int32,torch.int64: assert kinds(torch.zeros(2, 3, 4, 4, dtype=dtype))==(False,True)
    assert kinds(torch.zeros(2, 4, 4).byte())==(True,False) and kinds(torch.zeros(2, 4).byte())==(False,True)
    assert kinds(torch.zeros(2, 4, 4).bool())==(False,False)

def test_lam_broadcasts():
    lam = torch.rand(4, 2)[:,0]
    for shape in (4,),(4,3),(4,1,5,6): assert unsqueeze_as(lam, torch.rand(shape)).shape==(4,*[1]*(len(shape)-1))

Pair = namedtuple('Pair', 'a b')

def test_nests():
    "Named tuples stay, and mappings become dicts, in order; what is no tensor stays where it is"
    a,b,c = torch.rand(3, 2)
    nest = [Pair(a, 'text'), OrderedDict(z=b, y=(None,)), UserDict(x=[c])]
    flat = tensors_in(nest)
    assert flat[0] is a and flat[1]=='text' and flat[2] is b and flat[3] is None and flat[4] is c and len(flat)==5
    res = map_tensors(len, nest)
    assert res==[Pair(2, 'text'), dict(z=2, y=(None,)), dict(x=[2])] and type(res[0]) is Pair
    assert tensors_in(a)[0] is a and tensors_in(()) == [] and map_tensors(len, 'text')=='text'

# Nests keep their classes
class AttrDict(dict):
    "Its attributes are its values"
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__ = self

class Bunch(dict):
    "Its values are attributes, too"
    def __init__(self, **kwargs):
        super().__init__(kwargs)
        vars(self).update(kwargs)

class Held(MutableMapping):
    "Its values are in a dict of its own"
    def __init__(self, **kwargs): self._d = kwargs
    def __getitem__(self, k): return self._d[k]
    def __setitem__(self, k, v): self._d[k] = v
    def __delitem__(self, k): del self._d[k]
    def __iter__(self): return iter(self._d)
    def __len__(self): return len(self._d)
    def __getattr__(self, k):
        if k in ('_d','box'): raise AttributeError
        return self._d[k]

@dataclass
class Batch:
    img: torch.Tensor
    name: str = 'a'

@pytest.mark.parametrize('cls', [AttrDict, Bunch, Held, Batch, SimpleNamespace], ids=lambda o: o.__name__)
def test_values_and_attributes_of_a_nest_are_the_new_ones(cls):
    o = cls(img=(old := torch.ones(2)))
    res = map_tensors(lambda x: 2*x, o)
    assert type(res) is cls and res.img.equal(2*old) and o.img is old
    if isinstance(o, Mapping): assert res['img'] is res.img and o['img'] is old
    assert tensors_in(res)[0] is res.img

def test_a_mapping_that_shares_its_values_with_its_copies():
    class Shared(Held):
        def __init__(self, **kwargs): self.box = [kwargs]
        _d = property(lambda self: self.box[0])
    with pytest.raises(TypeError, match='Shared cannot be copied'): map_tensors(lambda x: 2*x, Shared(img=torch.ones(2)))

def test_a_key_that_is_the_name_of_an_attribute():
    o = map_tensors(lambda x: 2*x, UserDict(data=torch.ones(2), mask=torch.ones(1)))
    assert o['data'].equal(torch.full((2,), 2.)) and set(o)=={'data','mask'}
