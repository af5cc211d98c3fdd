"Every kind of input: what the model reads is the mixture of what it reads of each sample"
import pickle
from collections import UserDict, namedtuple
from collections.abc import Mapping
import pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.rnn import RNNCallback
from fastai.collab import EmbeddingDotBias
from fastai.losses import MSELossFlat
from fastai.tabular.model import TabularModel
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config
from fastai.text.models.core import get_text_classifier, masked_concat_pool
from torch import nn
from torch.testing import assert_close
from fastmix.callback import CutMix, MixUp, OneOf
from fastmix.codes import mix_codes, paddings
from fastmix.core import BlendPlan, derange
from fastmix.data import SecondLoader
from fastmix.manifold import ManifoldMixUp
from fastmix.mixes import Blend
from helpers import Record, mk_dls, mk_learn, quiet_fit

g = torch.Generator().manual_seed(0)
def ints(high, *shape, low=0): return torch.randint(low, high, shape, generator=g)
def floats(*shape): return torch.randn(*shape, generator=g)
y = ints(2, 32)
mixers = [MixUp(1.), MixUp(1., k=3), MixUp(1., per_batch=True), MixUp(1., p=.5), OneOf(MixUp(1.), MixUp(.1, k=4), None, per_batch=False)]

def by_share(plan, f):
    "Σ shares × f(sample), sample by sample"
    return torch.stack([sum(w*f(int(j)) for w,j in zip(ws, js)) for ws,js in zip(plan.shares.expand(plan.pairs.shape), plan.pairs)])

def soft_loss(b, c=2): return F.cross_entropy(b['pred'].detach(), by_share(b['plan'], lambda j: F.one_hot(b['loader_y'][j], c).float()))

class Record(Record):
    "Keeps the targets as they came, since mixed ones may be in another order"
    def before_batch(self): self.batches.append(dict(loader_x=self.learn.xb, loader_y=self.learn.yb[0]))

def fit(dls, model, mixer, loss_func=None, n_epoch=2, cbs=()):
    learn = quiet_fit(mk_learn(dls, model, loss_func, cbs=[mixer, record := Record(), *cbs]), n_epoch, lr=0.)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())
    return record.batches

# Tables

@pytest.mark.parametrize('mixer', mixers, ids=repr)
@pytest.mark.parametrize('n_cont', [0,3])
def test_tables(mixer, n_cont):
    "The network taken apart by hand: embeddings and numbers of each sample, blended, and then its layers"
    sizes = [(3,2),(7,4)]
    cat = torch.stack([ints(n, 32) for n,_ in sizes], 1)
    xs = [cat,floats(32, n_cont)] if n_cont else [cat]
    model = TabularModel(sizes, n_cont, 2, [9,5], bn_cont=False, use_bn=False)
    for b in fit(mk_dls(xs, [y], n_inp=len(xs)), model, mixer):
        xb = b['loader_x']
        h = by_share(b['plan'], lambda j: torch.cat([*(e.weight[xb[0][j,i]] for i,e in enumerate(model.embeds)), *(x[j] for x in xb[1:])]))
        assert_close(b['pred'], model.layers(h))
        assert_close(b['loss'], soft_loss(b))

def test_gradients_reach_the_vectors_of_both():
    emb,x = nn.Embedding(12, 3),torch.arange(12)[:,None]
    plan = BlendPlan(torch.tensor([.9,.6]), torch.tensor([7,8]))
    plan.n = 12
    emb(mix_codes(plan, x)).sum().backward()
    want = torch.zeros(12)
    want[[0,1,7,8]] = torch.tensor([.9,.6,.1,.4])
    assert_close(emb.weight.grad, want[:,None].expand(12, 3))

def test_recommendations():
    "Two columns, four embeddings"
    users = torch.stack([ints(9, 32), ints(5, 32)], 1)
    model = EmbeddingDotBias(4, 9, 5, (0,1))
    target = torch.rand(32, generator=g)
    for b in fit(mk_dls([users], [target]), model, MixUp(1.), MSELossFlat()):
        x = b['loader_x'][0]
        u,i,ub,ib = (by_share(b['plan'], lambda j: e.weight[x[j,c]]) for e,c in ((model.u_weight,0),(model.i_weight,1),(model.u_bias,0),(model.i_bias,1)))
        assert_close(b['pred'], torch.sigmoid((u*i).sum(1) + ub[:,0] + ib[:,0]))
        assert_close(b['loss'], F.mse_loss(b['pred'].detach(), by_share(b['plan'], lambda j: b['loader_y'][j])))

class Offsets(nn.Module):
    "One embedding for all columns, and another by an index of its own making"
    def __init__(self):
        super().__init__()
        self.emb,self.pos,self.out = nn.Embedding(10, 4),nn.Embedding(8, 4),nn.Linear(4, 2)
        self.register_buffer('offsets', torch.tensor([0,3,6]))
    def forward(self, x):
        e = self.emb(x.long() + self.offsets)
        return self.out((e + self.pos(torch.arange(x.shape[1]))).mean(1)) + self.pos(torch.arange(8)).mean()   # as many as a batch has

@pytest.mark.parametrize('dtype', [torch.int64, torch.int32, torch.int8, torch.uint8], ids=str)
def test_offsets_and_positions(dtype):
    model = Offsets()
    for b in fit(mk_dls([ints(3, 32, 3).to(dtype)], [y]), model, MixUp(1.)):
        x = b['loader_x'][0].long()
        h = by_share(b['plan'], lambda j: model.emb.weight[x[j]+model.offsets]) + model.pos.weight[:3]
        assert_close(b['pred'], model.out(h.mean(1)) + model.pos.weight.mean())

# Texts

def texts(bptt=5, n=32):
    "Padded as fastai pads: in front by whole pieces, behind by the rest of one; long ones first in each batch"
    tokens = torch.ones(n, 4*bptt, dtype=torch.int64)
    for i in range(n): tokens[i, bptt*(i%8//2):4*bptt-i%3] = ints(50, 4*bptt-i%3-bptt*(i%8//2), low=2)
    return tokens

def classifier(drop_mult=1., **kwargs):
    "A small one; without dropout: 1e-9, since fastai's `WeightDropout` fails at 0"
    config = awd_lstm_clas_config | dict(emb_sz=10, n_hid=12, n_layers=2)
    return get_text_classifier(AWD_LSTM, 50, 2, seq_len=5, config=config, drop_mult=drop_mult, **kwargs)

def alone(model, embedded, bptt):
    "The classifier on one text without padding: piece by piece, then pooled"
    enc,head = model
    enc.reset()
    out = torch.cat([enc.module(o[None], from_embeds=True) for o in embedded.split(bptt)], 1)
    return head.layers(masked_concat_pool(out, torch.zeros(out.shape[:2], dtype=torch.bool), bptt))[0]

@pytest.mark.parametrize('mixer', mixers, ids=repr)
def test_texts(mixer):
    "Mixtures as long as the longest of their parts; each read alone, without padding"
    bptt = 5
    model = classifier(1e-9, lin_ftrs=[], ps=[])
    model[1].layers = nn.Linear(30, 2)
    emb = model[0].module.encoder.weight
    for b in fit(mk_dls([texts(bptt)], [y], shuffle=False), model, mixer, cbs=[RNNCallback()], n_epoch=1):
        x = b['loader_x'][0]
        assert_close(b['loss'], soft_loss(b))
        mixed = by_share(b['plan'], lambda j: emb[x[j]])
        for i in range(8):
            used = (b['plan'].shares.expand(b['plan'].pairs.shape)[i]>0)
            real = (x[b['plan'].pairs[i][used]]!=1).any(0)
            assert_close(b['pred'][i], alone(model, mixed[i][real], bptt), rtol=1e-4, atol=1e-5)

def test_texts_are_learned():
    tokens = texts()
    label = (tokens==7).any(1).long()
    learn = quiet_fit(mk_learn(mk_dls([tokens], [label]), classifier(), cbs=[MixUp(.4), RNNCallback()]), 2)
    learn.validate()
    assert learn.get_preds()[0].shape==(32,2)

def test_tokens_dropped_are_dropped_for_all_parts():
    "The same vocabulary is dropped for a sample and its partners"
    drop = classifier()[0].module.encoder_dp
    drop.embed_p = .5
    x = ints(50, 8, 6, low=2)
    plan = Blend(1.).draw(x)
    torch.manual_seed(3)
    got = drop(mix_codes(plan, x))
    torch.manual_seed(3)
    e = drop(x)
    assert_close(got, by_share(plan, lambda j: e[j]))

# Several inputs, and nests of them

class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.body,self.out = nn.Sequential(nn.Flatten(), nn.Linear(3*5*4, 6)),nn.Linear(12, 2)
    def read(self, a, b): return self.out(torch.cat([self.body(a), self.body(b)], 1))
    def forward(self, x, *rest): return self.read(x, *rest) if rest else self.read(*(x.values() if isinstance(x, Mapping) else x))

Pair = namedtuple('Pair', 'a b')
nests = dict(two=lambda a,b: (a,b), tuple=lambda a,b: ((a,b),), list=lambda a,b: ([a,b],), named=lambda a,b: (Pair(a,b),),
    dict=lambda a,b: (dict(a=a, b=b),), mapping=lambda a,b: (UserDict(a=a, b=b),))

class Nest(Callback):
    order = -3
    def __init__(self, nest): self.nest = nest
    def before_batch(self): self.learn.xb = self.nest(*self.learn.xb)

@pytest.mark.parametrize('mixer', [MixUp(1.), CutMix(), MixUp(1., partners=derange)], ids=repr)
@pytest.mark.parametrize('nest', nests.values(), ids=nests)
def test_nests(nest, mixer):
    a,b = floats(32, 3, 5, 4),floats(32, 3, 5, 4)
    model = Siamese()
    for o in fit(mk_dls([a,b], [y], n_inp=2), model, mixer, cbs=[Nest(nest)]):
        came = o['loader_x'][0] if len(o['loader_x'])==1 else o['loader_x']
        a,b = came.values() if hasattr(came, 'values') else came
        assert_close(o['pred'], model(o['plan'].mix(a), o['plan'].mix(b)))
        assert_close(o['loss'], soft_loss(o))

@pytest.mark.parametrize('mixer', [MixUp(1.), CutMix(), OneOf(MixUp(1.), CutMix(), per_batch=False)], ids=repr)
def test_picture_table_and_categories(mixer):
    "Pictures cut, what belongs to them blended by the share of the picture that is left"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb,self.out = nn.Embedding(6, 3),nn.Linear(3*5*4+2+3, 2)
        def forward(self, cat, x, num): return self.out(torch.cat([x.flatten(1), num, self.emb(cat)], 1))
    pics,model = floats(32, 3, 5, 4),Net()
    for b in fit(mk_dls([ints(6, 32), pics, floats(32, 2)], [y], n_inp=3), model, mixer):
        cat,x,num = b['loader_x']
        rest = by_share(b['plan'], lambda j: torch.cat([num[j], model.emb.weight[cat[j]]]))
        assert_close(b['pred'], model.out(torch.cat([b['plan'].mix(x).flatten(1), rest], 1)))
        assert_close(b['loss'], soft_loss(b))

def test_partners_of_a_second_loader():
    dl = torch.utils.data.DataLoader(list(zip(ints(3, 20, 2), y[:20])), batch_size=5)
    model = TabularModel([(3,2)]*2, 0, 2, [9], use_bn=False)
    first = next(iter(dl))
    b = fit(mk_dls([ints(3, 32, 2)], [y]), model, MixUp(1., partners=SecondLoader(dl)))[0]
    x = torch.cat([b['loader_x'][0], first[0]])
    assert (b['plan'].idx>=8).all()
    assert_close(b['pred'], model.layers(by_share(b['plan'], lambda j: torch.cat([e.weight[x[j,i]] for i,e in enumerate(model.embeds)]))))

@pytest.mark.parametrize('shape', [(2,9), (1,4,3,5)], ids=['signals','volumes'])
@pytest.mark.parametrize('mixer', [MixUp(1.), CutMix()], ids=repr)
def test_signals_and_volumes(mixer, shape):
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))
    model(torch.randn(2, *shape))
    for b in fit(mk_dls([floats(32, *shape)], [y]), model, mixer):
        x,plan = b['loader_x'][0],b['plan']
        if isinstance(mixer, MixUp): want = by_share(plan, lambda j: x[j])
        else: want = torch.stack([torch.where(plan.region[i], x[j], x[i]) for i,j in enumerate(plan.idx)])
        assert_close(b['pred'], model(want))
        assert_close(b['loss'], soft_loss(b))

# Refused

class Counted(nn.Module):
    "A model with running means, that makes floats of integers in a way of its own"
    def __init__(self, f, n=6):
        super().__init__()
        self.bn,self.emb,self.out,self.f = nn.BatchNorm1d(n),nn.Embedding(9, n),nn.Linear(n, 2),f
    def forward(self, x): return self.out(self.bn(self.f(self, x)))

def many_hot(x):
    res = torch.zeros(len(x), 6)
    res[torch.arange(len(x))[:,None],x % 6] = 1.
    return res

def moved(x):
    res = torch.zeros_like(x.detach().as_subclass(torch.Tensor))
    res[:,1:] = x[:,:-1]
    return res

@pytest.mark.parametrize('f,what', [
    (lambda m,x: x.float(), 'followed into float'), (lambda m,x: x/9, 'have the data block give numbers as floats'),
    (lambda m,x: m.emb(x.sum(1) % 9), 'followed into embedding'), (lambda m,x: m.emb(x.argsort(0)).mean(1), 'followed into embedding'),
    (lambda m,x: torch.zeros(len(x), 6), 'looks nothing up by it'), (lambda m,x: m.emb(torch.tensor(x.tolist())).mean(1), 'followed into tolist'),
    (lambda m,x: F.linear(x, m.out.weight), 'linear does not take'), (lambda m,x: m.emb(x[:,0]) + x.float(), 'followed into float'),
    # The first column is looked up, and another is read in a way that would be the sample's own alone
    (lambda m,x: m.emb(x[:,0]) + m.emb(torch.tensor(x[:,1].tolist())), 'followed into tolist'), (lambda m,x: m.emb(x[:,0]) + m.emb(torch.from_numpy(x[:,1].numpy())), 'into numpy'),
    (lambda m,x: m.emb(x[:,0]) + torch.stack([m.emb.weight[int(o)] for o in x[:,1]]), 'followed into __int__'), (lambda m,x: m.emb(x[:,0]) + (x==5).float(), 'tells the parts'),
    (lambda m,x: m.emb(x[:,0]) + m.emb(torch.where(x[:,1]>4, 1, 2)), 'tells the parts'), (lambda m,x: m.emb(x[:,0]) + (x[:,1:2]==torch.arange(6)).float(), 'tells the parts'),
    (lambda m,x: m.emb(x[:,0]) + m.emb.weight[:,x[:,1] % 6].T[:,:6], 'followed into __getitem__'),
    # What is written elsewhere, and what is made of integers that can only be counted with
    (lambda m,x: m.emb(x[:,0]) + many_hot(x), 'writes into another tensor'), (lambda m,x: m.emb(x[:,0]) + torch.zeros(len(x), 9).scatter_(1, x, 1.)[:,:6], 'another tensor'),
    (lambda m,x: m.emb(x[:,0]) + torch.zeros(len(x), 9, dtype=torch.bool).scatter_(1, x, True)[:,:6], 'another tensor'),
    (lambda m,x: m.emb(x[:,0]) + m.emb(moved(x)).mean(1), 'another tensor'),
    (lambda m,x: (m.emb(x)*(torch.arange(6)<=x.argmax(1, keepdim=True))[...,None]).mean(1), 'tells the parts'), (lambda m,x: m.emb(x[:,0])*(x.sum(1, keepdim=True)>24), 'tells the parts'),
    (lambda m,x: m.emb(x[:,0])*x.sum(1)[0].item(), 'followed into item'), (lambda m,x: m.emb(x[:,0])*(x.max(1, keepdim=True).values>7), 'tells the parts'),
    (lambda m,x: m.emb(x[:,0])*(2 if 4 in x[0] else 1), 'followed into __contains__'), (lambda m,x: m.emb(x[:,0])*sum(map(bool, x.flatten())), 'followed into __bool__')])
def test_integers_without_an_embedding(f, what):
    "An error that names the input and the way out; the learner is as it was"
    model = Counted(f)
    learn = mk_learn(mk_dls([ints(9, 32, 6)], [y]), model, cbs=MixUp())
    own,state = learn.loss_func,{k:v.clone() for k,v in model.state_dict().items()}
    with pytest.raises(TypeError, match=what): learn.fit(1)
    if 'linear' in what: learn('after_fit')   # the model itself has failed, and the next event heals
    assert learn.loss_func is own
    for k,v in model.state_dict().items(): assert v.equal(state[k])
    assert not model._forward_pre_hooks
    learn.remove_cb(MixUp)
    if 'linear' not in what: quiet_fit(learn)

@pytest.mark.parametrize('idx', [torch.arange(8).roll(1), torch.zeros(8, dtype=torch.int64)], ids=['shuffle','one'])
@pytest.mark.parametrize('f', [lambda x: x.max().item(), lambda x: int(x.max()), lambda x: bool(x.min()>=0), lambda x: x.amax()<9, lambda x: (x.argmax(1)<9).all(),
    lambda x: len(x)>1 and x.sum()>3, lambda x: x.sort(1).values.shape, lambda x: x.unique().ndim])
def test_what_is_said_of_all_parts_may_be_asked(f, idx):
    "Such as the largest index of a batch, by which a model checks it, whoever is whose partner"
    x = ints(9, 8, 6)
    codes = mix_codes(BlendPlan(torch.full((8,), .6), idx), x)
    assert f(codes)==f(x) and not codes.log

def test_words_may_be_dropped_at_random():
    "The same ones of all parts, with as many random numbers as without mixing"
    x,w = ints(9, 8, 6),floats(9, 4)
    plan = Blend(1.).draw(x)
    def masked(x): return x.masked_fill(torch.randint_like(x, 0, 100)<30, 8)
    torch.manual_seed(1)
    masked(x)
    after = torch.rand(1)
    torch.manual_seed(1)
    codes = mix_codes(plan, x)
    got = F.embedding(masked(codes), w)
    assert torch.rand(1).equal(after) and not any(isinstance(o, Exception) for o in codes.log)
    torch.manual_seed(1)
    dropped = torch.randint_like(x, 0, 100)<30
    assert_close(got, torch.where(dropped[...,None], w[8], by_share(plan, lambda j: w[x[j]])))

def test_vectors_that_were_made_for_inference():
    with torch.inference_mode(): w = floats(9, 4)
    x = ints(9, 8, 6)
    plan = Blend(1.).draw(x)
    with torch.no_grad(): assert_close(F.embedding(mix_codes(plan, x), w), by_share(plan, lambda j: w[x[j]]))

@pytest.mark.parametrize('f', [lambda x: x[[2,0,1]], lambda x: x.flip(1), lambda x: x.flip(0), lambda x: x.roll(1, 0), lambda x: torch.cat([x, x.flip(0)]),
    lambda x: torch.cat([x, x[:,:2]], 1), lambda x: torch.stack([x[:,2],x[:,0],x[:,1]]), lambda x: torch.stack([x[:,0],x[:,2]], 1), lambda x: x[:,[1,2]],
    lambda x: x[torch.tensor([True,False,True])], lambda x: x.index_select(0, torch.tensor([1,1])), lambda x: x.view(-1)[2:7], lambda x: x.t().contiguous()])
def test_moved_integers(f):
    "They take their own shares along: the reference moves vectors that are mixed already"
    x,w = torch.arange(9).reshape(3, 3),floats(9, 4)
    plan = BlendPlan(torch.tensor([.9,.7,.6]), torch.tensor([1,2,0]))
    mixed = by_share(plan, lambda j: w[x[j]]).view(9, 4)
    assert_close(F.embedding(f(mix_codes(plan, x)), w), mixed[f(x)])

class TextAndKind(nn.Module):
    "Words, and one category for each text"
    def __init__(self):
        super().__init__()
        self.words,self.kinds,self.out = nn.Embedding(9, 4, padding_idx=0),nn.Embedding(3, 4),nn.Linear(4, 2)
    def forward(self, x, kind): return self.out(self.pool(self.words(x), x!=0) + self.kinds(kind))
    def pool(self, h, real): return (h*real[...,None]).sum(1)/real.sum(1, keepdim=True)

def test_a_mask_made_of_padding():
    "Padding is told apart, since a mixture is as long as its longest part; a second input has one dimension"
    x,kind,model = ints(9, 32, 6, low=1),ints(3, 32),TextAndKind()
    for o,n in zip(x, ints(6, 32, low=1)): o[n:] = 0
    for b in fit(mk_dls([x,kind], [y], n_inp=2), model, MixUp(1.)):
        (x0,kind0),plan = b['loader_x'],b['plan']
        real = torch.stack([(x0[js[ws>0]]!=0).any(0) for js,ws in zip(plan.pairs, plan.shares)])
        want = model.pool(by_share(plan, lambda j: model.words.weight[x0[j]]), real) + by_share(plan, lambda j: model.kinds.weight[kind0[j]])
        assert_close(b['pred'], model.out(want))

def test_what_is_never_mixed_stays_integers():
    "Without mixing, integers are given as they are: no embedding is asked for"
    model = Counted(lambda m,x: x.float())
    for mixer in MixUp(0), MixUp(1., p=0.):
        learn = quiet_fit(mk_learn(mk_dls([ints(9, 32, 6)], [y]), model, cbs=mixer))
        learn.validate()

@pytest.mark.parametrize('f', [lambda m,x: x.float(), lambda m,x: x/255], ids=['float','share'])
def test_bytes_of_one_dimension_are_refused_as_numbers(f):
    "They may be categories, of which there is no mean; with more dimensions they are pictures"
    flat = ints(256, 32, 6).byte()
    learn = mk_learn(mk_dls([flat], [y]), Counted(f), cbs=MixUp())
    with pytest.raises(TypeError, match='have the data block give numbers as floats'): learn.fit(1)
    model = Counted(lambda m,x: f(m, x).flatten(1))
    for b in fit(mk_dls([flat.view(32, 2, 3)], [y]), model, MixUp(1.)):
        assert (model.f(model, b['mixed'][0]) - model.f(model, by_share(b['plan'], lambda j: b['loader_x'][0][j]))).abs().max() <= .5

@pytest.mark.parametrize('event', ['before_batch','after_pred'])
def test_targets_of_sorted_texts_that_are_changed_in_place(event):
    "Texts are put in another order, so that their targets are copies: the loss would not see the change"
    class Changes(Callback):
        order,run_valid = (5 if event=='before_batch' else -4),False
    setattr(Changes, event, lambda self: self.learn.yb[0].zero_())
    learn = mk_learn(mk_dls([texts()], [y]), classifier(), cbs=[MixUp(1.), RNNCallback(), Changes()])
    with pytest.raises(RuntimeError, match='has changed the targets'): quiet_fit(learn)

def test_truth_values_are_refused():
    learn = mk_learn(mk_dls([ints(2, 32, 6).bool()], [y]), Counted(lambda m,x: x.float()), cbs=MixUp())
    with pytest.raises(TypeError, match='torch.bool'): learn.fit(1)

def test_writing_into_codes():
    "A model that writes into its input writes into all parts"
    x = ints(9, 8, 3)
    plan,w = Blend(1.).draw(x),floats(9, 4)
    codes = mix_codes(plan, x)
    codes[:,0] = 4
    codes.clamp_(max=6)
    z = x.clone().clamp(max=6)
    z[:,0] = 4
    assert_close(F.embedding(codes, w), by_share(plan, lambda j: w[z[j]]))

def test_paddings():
    assert paddings(nn.Sequential(nn.Embedding(3, 2), nn.Embedding(3, 2, padding_idx=0), nn.EmbeddingBag(3, 2, padding_idx=2)))==[0,2]
    assert paddings(nn.Linear(2, 2))==[]

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_of_vectors(dtype):
    emb,x = nn.Embedding(9, 4).to(dtype),ints(9, 8, 3)
    plan = Blend(1.).draw(x)
    got = emb(mix_codes(plan, x))
    assert got.dtype==dtype and type(got) is torch.Tensor
    assert_close(got.double(), by_share(plan, lambda j: emb.weight[x[j]].double()), rtol=.01, atol=.01)

# Interrupted, or called more often

class WordsNorm(nn.Module):
    "Categories, with running means"
    def __init__(self):
        super().__init__()
        self.emb,self.bn,self.out,self.live = nn.Embedding(9, 3),nn.BatchNorm1d(18),nn.Linear(18, 2),False
    def forward(self, x):
        h = self.bn(self.emb(x).flatten(1))
        if self.live: raise KeyboardInterrupt
        return self.out(h)

@pytest.mark.parametrize('heal', ['validate','get_preds','__getstate__','remove_cb'])
def test_weights_that_are_loaded_after_an_interruption_stay(heal):
    model = WordsNorm()
    learn = quiet_fit(mk_learn(mk_dls([ints(9, 32, 6)], [y]), model, cbs=MixUp()))
    best = {k:v.clone() for k,v in model.state_dict().items()}
    model.bn.running_mean.fill_(7)
    model.live = True
    with pytest.raises(KeyboardInterrupt): quiet_fit(learn)
    model.live = False
    pickle.dumps(model)
    model.load_state_dict(best)
    with learn.no_logging(): getattr(learn, heal)(*[MixUp]*(heal=='remove_cb'))
    for k,v in model.state_dict().items(): assert v.equal(best[k]), k
    assert not any(m._forward_pre_hooks for m in model.modules())

class Twice(Callback):
    "A second gradient at the same place, as of sharpness-aware minimisation with ρ = 0"
    run_valid = False
    def before_fit(self): self.grads = []
    def before_step(self):
        first = [p.grad.clone() for p in self.model.parameters()]
        self.model.zero_grad()
        self.learn.loss_func(self.model(*self.learn.xb), *self.learn.yb).backward()
        self.grads.append((first,[p.grad.clone() for p in self.model.parameters()]))

@pytest.mark.parametrize('model,x,mixer', [(nn.Linear(6, 2), floats(32, 6), MixUp(1.)), (WordsNorm(), ints(9, 32, 6), MixUp(1.)),
    (nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), floats(32, 6), ManifoldMixUp(1., layers='0'))], ids=['floats','integers','hidden'])
def test_a_second_gradient_of_the_batch_is_the_first(model, x, mixer):
    quiet_fit(mk_learn(mk_dls([x], [y]), model, cbs=[mixer, twice := Twice()]))
    for first,second in twice.grads:
        for a,b in zip(first, second): assert_close(a, b)

def test_a_batch_that_is_cancelled_leaves_the_next_one_alone():
    "That one is not mixed, so nothing need be looked up"
    class Skip(Callback):
        order,run_valid = 5,False
        def before_batch(self):
            if not self.iter: raise CancelBatchException
    learn = mk_learn(mk_dls([ints(9, 32, 6)], [y]), Counted(lambda m,x: x.float()), cbs=[MixUp(1., until=.1), Skip()])
    quiet_fit(learn)
