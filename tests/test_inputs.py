"What a model reads of a mixture is the mixture of what it reads of each part"
import copy, io, operator, pickle
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.rnn import RNNCallback
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.data.block import CategoryBlock
from fastai.tabular.core import Categorify, Normalize, TabularPandas
from fastai.tabular.learner import tabular_learner
from fastai.tabular.model import TabularModel
from fastai.text.core import Tokenizer
from fastai.text.data import TextDataLoaders
from fastai.text.learner import language_model_learner, text_classifier_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config, awd_lstm_lm_config
from fastai.text.models.core import get_text_classifier, masked_concat_pool
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from fastmix.inputs import Lookups, MixedInputs, StackedParts, is_padding, mix_lookups, paddings, sort_by_padding
from fastmix.mixers import CutMix, MixUp, OneOf
from fastmix.plan import Plan
from helpers import mk_dls, mk_learn, name_of, quiet_fit, Record

g = torch.Generator().manual_seed(0)
def ints(high, *shape, low=0): return torch.randint(low, high, shape, generator=g)
def floats(*shape): return torch.randn(*shape, generator=g)
y = ints(2, 32)
mixers = [MixUp(1.), MixUp(1., k=3), MixUp(1., per_batch=True), MixUp(1., p=.5), OneOf(MixUp(1.), MixUp(.1, k=4), None, per_batch=False)]

def rows(plan): return zip(plan.weights.expand(plan.pairs.shape), plan.pairs)
def by_weight(plan, f):
    "Σ weight × f(position of the sample), mixture by mixture"
    return torch.stack([sum(w*f(int(j)) for w,j in zip(ws, js)) for ws,js in rows(plan)])

def soft_loss(b, c=2):
    y = b['loader_y'].view(-1)
    return F.cross_entropy(b['pred'].detach(), by_weight(b['plan'], lambda j: F.one_hot(y[j].long(), c).float()))

class Record(Record):
    "Keeps the batch as it came, since mixtures may be in another order"
    def before_batch(self):
        self.batches.append(dict(loader_x=self.learn.xb, loader_y=self.learn.yb[0], before=[o.clone() for o in self.learn.xb]))

def quiet(learn): return learn.remove_cbs([cb for cb in learn.cbs if cb.name=='progress'])
def watch(learn, mixer, n_epoch=2, cbs=()):
    "The batches of a fit that changes no weights; the loader's tensors are not written to"
    quiet_fit(learn.add_cbs([mixer, record := Record(), *cbs]), n_epoch, lr=0.)
    learn.remove_cb(mixer)
    for b in record.batches: assert all(x.equal(o) for x,o in zip(b['loader_x'], b['before']))
    return record.batches

def fit(xs, y, model, mixer, loss_func=None, shuffle=True, **kwargs):
    return watch(mk_learn(mk_dls(xs, [y], n_inp=len(xs), shuffle=shuffle), model, loss_func), mixer, **kwargs)

def of_rows(model, xb, j):
    "What a `TabularModel` reads of row `j`"
    return torch.cat([*(e.weight[xb[0][j,i].long()] for i,e in enumerate(model.embeds)), *(x[j] for x in xb[1:])])

# Tables

@pytest.mark.parametrize('mixer,n_cont', [*zip(mixers, [3,0,3,0,3])], ids=name_of)
def test_tables(mixer, n_cont):
    "The model taken apart by hand: embeddings and numbers of each row, blended, and then its layers"
    sizes = [(3,2),(7,4)]
    xs = [torch.stack([ints(n, 32) for n,_ in sizes], 1)] + [floats(32, n_cont)]*(n_cont>0)
    model = TabularModel(sizes, n_cont, 2, [9,5], bn_cont=False, use_bn=False)
    for b in fit(xs, y, model, mixer):
        assert_close(b['pred'], model.layers(by_weight(b['plan'], lambda j: of_rows(model, b['loader_x'], j))))
        assert_close(b['loss'], soft_loss(b))

class Bytes(Callback):
    order,run_valid = 5,False
    def before_batch(self): self.learn.xb = (self.xb[0].byte(),self.xb[1])

class LongTabular(TabularModel):
    def forward(self, x_cat, x_cont): return super().forward(x_cat.long(), x_cont)

@pytest.mark.parametrize('bytes', [False, True])
def test_tabular_learner(bytes):
    df = pd.DataFrame(dict(a=list('xyzz')*8, b=list('pqrst')*6+list('pq'), c=np.linspace(0, 3, 32), kind=[0,1]*16))
    to = TabularPandas(df, [Categorify,Normalize], ['a','b'], ['c'], 'kind', CategoryBlock(), ([*range(24)],[*range(24,32)]))
    learn = quiet(tabular_learner(to.dataloaders(bs=8), [9], config=dict(use_bn=False, bn_cont=False)))
    if bytes: learn.model.__class__ = LongTabular
    for b in watch(learn, MixUp(1.), cbs=[Bytes()]*bytes):
        x = b['mixed'][0]
        assert type(x) is (Lookups if bytes else StackedParts) and x.dtype==(torch.uint8 if bytes else torch.int64)
        assert_close(b['pred'], learn.model.layers(by_weight(b['plan'], lambda j: of_rows(learn.model, b['loader_x'], j))))
        assert_close(b['loss'], soft_loss(b))
    assert len(learn.get_preds()[0])==8

def test_gradients_reach_the_vectors_of_both():
    emb,x = nn.Embedding(12, 3),torch.arange(12)[:,None]
    emb(mix_lookups(Plan.of(torch.tensor([7,8]), torch.tensor([.9,.6]), n=12), x)).sum().backward()
    want = torch.zeros(12)
    want[[0,1,7,8]] = torch.tensor([.9,.6,.1,.4])
    assert_close(emb.weight.grad, want[:,None].expand(12, 3))

@pytest.mark.parametrize('use_nn', [False, True])
def test_collab_learner(use_nn):
    df = pd.DataFrame(dict(user=list('abcd')*8, title=list('pqrst')*6+list('pq'), rating=np.linspace(0, 5, 32)))
    dls = CollabDataLoaders.from_df(df, bs=8, valid_pct=.25, seed=1)
    learn = quiet(collab_learner(dls, 4, use_nn=use_nn, y_range=(0,5), config=dict(use_bn=False) if use_nn else None))
    m = learn.model
    for b in watch(learn, MixUp(1.)):
        x = b['loader_x'][0]
        def of(e, c): return by_weight(b['plan'], lambda j: e.weight[x[j,c]])
        if use_nn: want = m.layers(torch.cat([of(e, i) for i,e in enumerate(m.embeds)], 1))
        else: want = 5*torch.sigmoid((of(m.u_weight, 0)*of(m.i_weight, 1)).sum(1) + of(m.u_bias, 0)[:,0] + of(m.i_bias, 1)[:,0])
        assert_close(b['pred'], want)
        assert_close(b['loss'], F.mse_loss(b['pred'].detach().flatten(), by_weight(b['plan'], lambda j: b['loader_y'][j]).flatten()))

# Models of one's own

class Own(nn.Module):
    "Vectors of three columns by `f`, their mean, and a layer"
    def __init__(self, f):
        super().__init__()
        self.emb,self.bag,self.out,self.f = nn.Embedding(12, 12),nn.EmbeddingBag(12, 12),nn.Linear(12, 2),f
    def read(self, x): return self.f(self, x).float()
    def forward(self, x):
        h = self.read(x)
        return self.out(h if h.ndim==2 else h.mean(1))

offsets,swapped = torch.tensor([0,3,6]),torch.arange(12).flip(0)
@pytest.mark.parametrize('f,dtype', [(lambda m,x: m.emb(x), torch.int32), (lambda m,x: m.emb(x.long()+offsets), torch.uint8),
    (lambda m,x: m.emb(offsets+x) + m.emb(torch.arange(x.shape[1])), torch.int64), (lambda m,x: m.bag(x), torch.int64),
    (lambda m,x: F.one_hot(x, 12), torch.int64), (lambda m,x: F.one_hot(x, 12).sum(1), torch.int64),
    (lambda m,x: m.emb.weight[x], torch.int64), (lambda m,x: m.emb(swapped[x]), torch.int64),
    (lambda m,x: torch.stack([m.emb(o) for o in x.T], 1), torch.int64), (lambda m,x: torch.stack([m.emb(o) for o in x]), torch.int64),
    (lambda m,x: checkpoint(m.emb, x, use_reentrant=False), torch.int64)])
def test_own_models(f, dtype):
    model = Own(f)
    for b in fit([ints(3, 32, 3).to(dtype)], y, model, MixUp(1.), n_epoch=1):
        read = model.read(b['loader_x'][0])
        h = by_weight(b['plan'], lambda j: read[j])
        assert_close(b['pred'], model.out(h if h.ndim==2 else h.mean(1)))
        assert_close(b['loss'], soft_loss(b))

@pytest.mark.filterwarnings('ignore')
def test_a_compiled_model():
    model,x = Own(lambda m,x: m.emb(x+offsets)),ints(3, 8, 3)
    mixed = mix_lookups(MixUp(1.).draw(x), x)
    assert_close(torch.compile(model, backend='eager')(mixed), model(mixed))

# Texts

def texts(bptt=5, n=32):
    "Padded as fastai pads: in front by whole pieces, behind by the rest of one; long ones first in each batch"
    tokens = torch.ones(n, 4*bptt, dtype=torch.int64)
    for i in range(n): tokens[i, bptt*(i%8//2):4*bptt-i%3] = ints(50, 4*bptt-i%3-bptt*(i%8//2), low=2)
    return tokens

small = dict(emb_sz=10, n_hid=12, n_layers=2)
def classifier(drop_mult=1., **kwargs):
    "A small one; without dropout: 1e-9, since fastai's `WeightDropout` fails at 0"
    return get_text_classifier(AWD_LSTM, 50, 2, seq_len=5, config=awd_lstm_clas_config|small, drop_mult=drop_mult, **kwargs)

def of_text(model, embedded, bptt):
    "The classifier on one text without padding: piece by piece, then pooled"
    enc,head = model
    enc.reset()
    out = torch.cat([enc.module(o[None], from_embeds=True) for o in embedded.split(bptt)], 1)
    return head.layers(masked_concat_pool(out, torch.zeros(out.shape[:2], dtype=torch.bool), bptt))[0]

def check_texts(model, batches, bptt):
    "Mixtures as long as the longest of their parts, each read alone, without padding"
    emb = model[0].module.encoder.weight
    for b in batches:
        x = b['loader_x'][0]
        assert_close(b['loss'], soft_loss(b))
        mixed = by_weight(b['plan'], lambda j: emb[x[j]])
        for i,(ws,js) in enumerate(rows(b['plan'])):
            real = (x[js[ws>0]]!=1).any(0)
            assert_close(b['pred'][i], of_text(model, mixed[i][real], bptt), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('mixer', mixers, ids=name_of)
def test_texts(mixer):
    model = classifier(1e-9, lin_ftrs=[], ps=[])
    model[1].layers = nn.Linear(30, 2)
    check_texts(model, fit([texts()], y, model, mixer, shuffle=False, cbs=[RNNCallback()], n_epoch=1), 5)

sentences = ['the cat sat on the mat', 'a dog barked loudly at the moon and the cat', 'dogs bark', 'cats and dogs sat on a wall']*8
words = pd.DataFrame(dict(text=[' '.join(o.split()*(1+i%3)) for i,o in enumerate(sentences)], kind=[0,1]*16))

class Split:
    "A tokenizer that splits at spaces"
    def __call__(self, items): return (o.split() for o in items)

def text_dls(**kwargs):
    tok_tfm = Tokenizer.from_df('text', tok=Split(), n_workers=0)
    return TextDataLoaders.from_df(words, text_col='text', tok_tfm=tok_tfm, valid_pct=.25, seed=1, bs=8, device='cpu', **kwargs)

def test_text_classifier_learner():
    dls = text_dls(label_col='kind', seq_len=5)
    config = awd_lstm_clas_config|small
    learn = quiet(text_classifier_learner(dls, AWD_LSTM, seq_len=5, config=config, pretrained=False, drop_mult=1e-9, lin_ftrs=[], ps=[]))
    learn.model[1].layers = nn.Linear(30, 2)
    check_texts(learn.model, watch(learn, MixUp(1.), n_epoch=1), 5)
    assert learn.get_preds()[0].shape==(8,2)

def test_language_model_learner():
    "At each place, vectors of two texts are mixed, and the losses on their next tokens"
    dls = text_dls(is_lm=True, seq_len=6)
    learn = quiet(language_model_learner(dls, AWD_LSTM, config=awd_lstm_lm_config|small, pretrained=False, drop_mult=1e-9))
    batches = watch(learn, MixUp(1.), n_epoch=1)
    enc,dec = learn.model.train()
    enc.reset()
    for b in batches:
        x = b['loader_x'][0]
        want = dec(enc(by_weight(b['plan'], lambda j: enc.encoder.weight[x[j]]), from_embeds=True))[0]
        assert_close(b['pred'], want, rtol=1e-4, atol=1e-5)
        target = by_weight(b['plan'], lambda j: F.one_hot(b['loader_y'][j], want.shape[-1]).float())
        assert_close(b['loss'], F.cross_entropy(want.detach().flatten(0, 1), target.flatten(0, 1)), rtol=1e-4, atol=1e-5)

def test_tokens_dropped_are_dropped_for_all_parts():
    "The same vocabulary is dropped for a sample and its partners"
    drop = classifier()[0].module.encoder_dp
    drop.embed_p = .5
    x = ints(50, 8, 6, low=2)
    plan = MixUp(1.).draw(x)
    torch.manual_seed(3)
    got = drop(mix_lookups(plan, x))
    torch.manual_seed(3)
    e = drop(x)
    assert_close(got, by_weight(plan, lambda j: e[j]))

class TextAndKind(nn.Module):
    "Words, and one category for each text"
    def __init__(self):
        super().__init__()
        self.words,self.kinds,self.out = nn.Embedding(9, 4, padding_idx=0),nn.Embedding(3, 4),nn.Linear(4, 2)
    def forward(self, x, kind): return self.out(self.pool(self.words(x), x!=0) + self.kinds(kind))
    def pool(self, h, real): return (h*real[...,None]).sum(1)/real.sum(1, keepdim=True)

def test_a_mask_made_of_padding():
    "Padding is recognised, since a mixture is as long as its longest part; a second input has one dimension"
    x,kind,model = ints(9, 32, 6, low=1),ints(3, 32),TextAndKind()
    for o,n in zip(x, ints(6, 32, low=1)): o[n:] = 0
    for b in fit([x,kind], y, model, MixUp(1.)):
        (x0,kind0),plan = b['loader_x'],b['plan']
        real = torch.stack([(x0[js[ws>0]]!=0).any(0) for ws,js in rows(plan)])
        assert ((~real).sum(1).diff()>=0).all()   # by the text's padding alone
        text,kinds = by_weight(plan, lambda j: model.words.weight[x0[j]]),by_weight(plan, lambda j: model.kinds.weight[kind0[j]])
        assert_close(b['pred'], model.out(model.pool(text, real) + kinds))

def test_a_category_is_no_padding():
    kind = mix_lookups(Plan.of(torch.tensor([1,0]), torch.tensor([.6,.7])), torch.tensor([0,2]), [0])
    with pytest.raises(TypeError, match='tells the parts'): kind==0
    assert not (kind==1).any()

@pytest.mark.parametrize('mixer', mixers, ids=name_of)
def test_padding_of_mixtures(mixer):
    "A place is padding where all parts with a weight are padded, by either of two padding numbers"
    x = texts()
    x[::2][x[::2]==1] = 0
    plan = mixer.draw(x)
    want = torch.stack([((x[js[ws>0]]==1) | (x[js[ws>0]]==0)).all(0) for ws,js in rows(plan)])
    mixed = mix_lookups(plan, x, [0,1])
    assert is_padding(mixed.plain, [0,1]).equal(want)
    model = nn.Sequential(nn.Embedding(50, 2, padding_idx=0), nn.EmbeddingBag(50, 2, padding_idx=1), nn.Embedding(50, 2))
    assert paddings(model)==[0,1] and paddings(nn.Linear(2, 2))==[]==paddings(None)
    n_words = mix_lookups(sort_by_padding(plan, (x,), model), x, [0,1]).mixtures.valid.any(0).view(x.shape).sum(1)
    assert (n_words.diff()<=0).all() and n_words.sort()[0].equal((~want).sum(1).sort()[0])

def test_a_part_without_weight_is_no_part():
    "It affects neither the padding nor comparisons"
    x,lam = torch.tensor([[2,3,4],[5,1,1]]),torch.tensor([0.,1.])
    mixed = mix_lookups(Plan.of(torch.tensor([1,0]), lam), x, [1])
    assert (mixed==1).equal(torch.tensor([[False,True,True]]*2)) and (mixed==5).equal(torch.tensor([[True,False,False]]*2))

# With images, and with nothing to mix

@pytest.mark.parametrize('mixer', [MixUp(1.), CutMix(), OneOf(MixUp(1.), CutMix(), per_batch=False)], ids=name_of)
def test_image_numbers_and_categories(mixer):
    "Images cut, what belongs to them blended by the fraction of the image that is left"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb,self.out = nn.Embedding(6, 3),nn.Linear(3*5*4+2+3, 2)
        def forward(self, cat, x, num): return self.out(torch.cat([x.flatten(1), num, self.emb(cat)], 1))
    model = Net()
    for b in fit([ints(6, 32), floats(32, 3, 5, 4), floats(32, 2)], y, model, mixer):
        cat,x,num = b['loader_x']
        rest = by_weight(b['plan'], lambda j: torch.cat([num[j], model.emb.weight[cat[j]]]))
        assert_close(b['pred'], model.out(torch.cat([b['plan'].mix(x).flatten(1), rest], 1)))
        assert_close(b['loss'], soft_loss(b))

def test_a_mask_as_an_input_is_cut():
    "Integers with the dimensions of the region are cut with it, and stay plain integers"
    x,mask = floats(8, 3, 6, 6),ints(4, 8, 1, 6, 6)
    plan = CutMix().draw(x)
    cut,mixed = MixedInputs(plan, (mask,x)).xs
    assert type(cut) is Tensor and cut.equal(plan.mix(mask)) and mixed.equal(plan.mix(x))

def test_what_is_never_mixed_stays_integers():
    for mixer in MixUp(0), MixUp(1., p=0.):
        for b in fit([ints(9, 32, 12)], y, Own(lambda m,x: x.float()), mixer, n_epoch=1): assert type(b['mixed'][0]) is Tensor

def test_truth_values_are_refused():
    with pytest.raises(TypeError, match='torch.bool'): fit([ints(2, 32, 12).bool()], y, Own(lambda m,x: x.float()), MixUp())

def test_bytes_of_one_dimension_are_refused_as_numbers():
    "They may be categories, of which there is no mean; with more dimensions they are images"
    flat = ints(256, 32, 12).byte()
    with pytest.raises(TypeError, match='float cannot be followed'): fit([flat], y, Own(lambda m,x: x.float()), MixUp())
    for b in fit([flat.view(32, 3, 4)], y, Own(lambda m,x: x.flatten(1)), MixUp(1.)):
        assert (b['mixed'][0].float() - by_weight(b['plan'], lambda j: b['loader_x'][0][j])).abs().max() <= .5

# What is followed, and what is refused

w = floats(9, 4)
plan = Plan.of(torch.tensor([1,2,0]), torch.tensor([.9,.7,.6]))
x = torch.arange(9).view(3, 3)
mixed = by_weight(plan, lambda j: w[x[j]]).view(9, 4)

moves = '''x[[2,0,1]] | x.flip(1) | torch.cat([x, x.flip(0)]) | torch.cat([x, x[:,:2]], 1) | torch.stack([x[:,2],x[:,0],x[:,1]])
        x[:,[1,2]] | x[torch.tensor([True,False,True])] | x[torch.eye(3)>0] | x.view(-1)[2:7] | x.t().contiguous()
        x[:,:2].clone().view(-1) | x.split([1,2], 1)[1] | x.chunk(2)[0] | x.unsqueeze(1).expand(3, 2, 3) | x[:0]
        x.squeeze(0).detach() | torch.unbind(x, 1)[2] | torch.flatten(x) | x.T.long() | next(iter(x))'''
def lines(text): return [o for line in text.split('\n') for o in line.strip().split(' | ')]

def test_moved_integers():
    "They take their weights along: the reference moves vectors that are mixed already"
    for f in lines(moves):
        moved,at = (eval(f, globals() | dict(x=o)) for o in (mix_lookups(plan, x),x))
        assert isinstance(moved, Lookups) and moved.shape==at.shape, f
        assert_close(F.embedding(moved, w), mixed[at], msg=f)

of_each = '''x+2 | 2+x | other+x | x-0 | 8-x | x*1 | 1*x | x%5 | x//2 | x.clamp(2, 5) | torch.add(x, 0) | x.to(torch.int32) | x.int()
        x.type(torch.long) | swapped[x]'''
def test_integers_of_each_value():
    "The reference looks them up for the sample and for its partner"
    w,lam = floats(12, 4),plan.lam[:,None,None]
    for f in lines(of_each):
        made,*parts = (eval(f, globals() | dict(x=o, other=torch.tensor([0,1,2]))) for o in (mix_lookups(plan, x),x,x[plan.idx]))
        assert_close(F.embedding(made, w), lam*w[parts[0]] + (1-lam)*w[parts[1]], msg=f)
    turned = by_weight(plan, lambda j: w[x[j]+1]).transpose(0, 1)
    moved = (mix_lookups(plan, x).T+1)[:,:2].reshape(-1)   # before and after
    assert_close(F.embedding(moved, w), turned[:,:2].reshape(-1, 4))

refused = dict(
    floats='''x.float() | x/9 | x*.5 | x+.5 | x.to(w) | x.to(torch.half) | x.type(torch.float) | F.linear(x, w.T) | x@x.T | 2**x
        x.view(torch.double) | torch.as_tensor(x, dtype=torch.float)''',
    told_apart='''x==5 | x!=5 | 5==x | x>4 | torch.eq(x, 5) | x[:,:1]==torch.arange(3) | x==x | x==x.flip(0) | torch.equal(x, x)
        x.bool() | torch.isin(x, i) | torch.isin(i, x) | torch.where(x>4, 1, 2) | torch.where(i>4, x, i) | x.masked_fill(i>2, 0)
        x.nonzero() | ~x | x&1 | 5 in x | i==x | (torch.arange(9)>3)[x] | i.equal(x) | i in [x]''',
    reduced='''x.sum() | x.sum(1) | x.float().mean() | x.max() | x.max(1) | x.argmax(1) | x.argsort(1) | x.sort(1) | x.cumsum(1)
        x.bincount() | torch.bincount(x.flatten()) | x.unique() | x.topk(1) | x.any() | max(x) | sorted(x) | sum(x) | all(x[0])''',
    taken_out='''x[0,0] | list(x[0]) | x.tolist() | x.item() | x[:1,:1].item() | int(x[:1,:1]) | bool(x[:1,:1]) | float(x[:1,:1])
        x.numpy() | np.asarray(x) | np.array(x) | i.tolist()[x[:1,:1]] | range(9)[x[0,:1]] | x.__array__() | torch.from_dlpack(x)
        x.data | x.data_ptr() | x.untyped_storage() | torch.full((2,), x[0,0]) | w.narrow(0, 0, x[0,0]) | w[:x[0,:1]]''',
    copied='''copy.copy(x) | copy.deepcopy(x) | pickle.dumps(x) | torch.save(x, io.BytesIO()) | torch.tensor(x) | Tensor(x)
        torch.LongTensor(x) | torch.tensor(list(x)) | i.new_tensor(x) | x.as_subclass(Tensor) | Tensor._make_subclass(Tensor, x)
        torch.nested.nested_tensor([x]) | i.set_(x) | torch.jit.script(nn.Embedding(9, 4))(x)
        torch.ops.aten.index_select(w, 0, x[0])''',
    two='''torch.cat([x, i]) | torch.cat([i, x]) | torch.stack([x, i]) | torch.cat([x, x+1]) | torch.cat([x, other]) | x+x
        x[:,0]*3+x[:,1] | x[x] | x*other | torch.clamp(x, max=x) | F.embedding(x, x)''',
    looked_up='''w.T[:,x] | torch.ones(3, 3)[:,x%3] | w[x,x] | w[None][0,x] | w.index_select(0, x[0]) | w.gather(0, x)
        torch.take(w, x) | F.embedding(x, torch.arange(18).view(9, 2)) | F.embedding_bag(x.T, w)
        F.embedding_bag(x.flatten(), w, torch.tensor([0,3,6])) | F.one_hot(x[:1]) | F.cross_entropy(w[:3], x[:,0])
        w.repeat_interleave(x[0], 0) | torch.searchsorted(i, x)''',
    written='''x.add_(1) | x.__setitem__(0, 1) | x.clamp_(max=2) | x.zero_() | x.unsqueeze_(0) | x.t_() | x.copy_(i)
        operator.iadd(x, 1) | operator.ior(x, 1) | x.requires_grad_() | setattr(x, "data", i) | i.copy_(x) | i.add_(x)
        i.__setitem__(0, x[0]) | i.__setitem__(x[:,0]%3, 1) | w.__setitem__(x, 1.) | w.index_fill_(0, x[0], 1.)
        torch.zeros(3, 9).scatter(1, x, 1.) | torch.zeros(3, 9).scatter_(1, x, 1.)
        torch.zeros(3, 9).scatter_add_(1, x, torch.ones(3, 3)) | torch.zeros(9).index_add(0, x[0], torch.ones(3))
        torch.zeros(9, 3).index_put((x[:,0],), torch.ones(3)) | torch.add(x, 1, out=i) | torch.cat([x, x], out=i.new_empty(0))
        torch.index_select(w, 0, x[0], out=torch.zeros(0))''')

libraries = dict(copy=copy, io=io, operator=operator, pickle=pickle)

def answer_of(f, **names):
    "The message of a `TypeError`, or the result if there is none"
    try: return eval(f, globals() | libraries | names)
    except TypeError as e: return str(e)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', refused)
def test_what_is_refused(kind):
    "The error comes at once, says what to do, and nothing is written"
    v,i = w.clone(),x.clone()
    answers = {f: answer_of(f, w=v, i=i, x=mix_lookups(plan, x), other=mix_lookups(plan, x)) for f in lines(refused[kind])}
    assert not {f:o for f,o in answers.items() if 'ManifoldMixUp(layers=...)' not in str(o)}
    assert v.equal(w) and i.equal(x)

def test_what_is_the_same_for_all_parts_may_be_asked():
    mixed = mix_lookups(plan, x)
    assert (mixed>=0).all() and not (mixed==9).any() and (mixed<9).shape==(3,3)
    assert mixed.shape==(3,3) and len(mixed)==3 and mixed.ndim==2 and mixed.T[0].shape==(3,)
    assert mixed.dtype==torch.int64 and mixed.device==x.device and not mixed.is_cuda
    assert mixed.new_zeros(2).equal(torch.tensor([0,0])) and torch.zeros_like(mixed).equal(0*x) and f'{mixed}'==f'{x}'
    assert mix_lookups(Plan.of(torch.tensor([0,1,2]), plan.lam), x).eq(5).equal(x==5)   # each with itself

def test_a_refusal_in_a_fit():
    "The learner's loss and weights are its own, and without a mixer it trains"
    model = Own(lambda m,x: m.emb(x).mean(1) + (x==5).float())
    learn = mk_learn(mk_dls([ints(9, 32, 12)], [y]), model, cbs=MixUp())
    loss_func,state = learn.loss_func,copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match='eq tells the parts of a mixture apart. .*padding_idx'): learn.fit(1)
    for k,v in model.state_dict().items(): assert v.equal(state[k])
    learn.remove_cb(MixUp)
    assert learn.loss_func is loss_func
    quiet_fit(learn)

# Vectors

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64], ids=name_of)
def test_dtype_of_vectors(dtype):
    emb,x = nn.Embedding(9, 4).to(dtype),ints(9, 8, 3)
    plan = MixUp(1.).draw(x)
    got = emb(mix_lookups(plan, x))
    assert got.dtype==dtype and type(got) is Tensor
    assert_close(got.double(), by_weight(plan, lambda j: emb.weight[x[j]].double()), rtol=.01, atol=.01)

def test_vectors_of_a_limited_length_and_for_inference():
    emb = nn.Embedding(9, 4, max_norm=.5)
    short = emb.weight.data * (.5/emb.weight.data.norm(dim=1, keepdim=True)).clamp(max=1)
    assert_close(emb(mix_lookups(plan, x)), by_weight(plan, lambda j: short[x[j]]))
    with torch.inference_mode(): w = floats(9, 4)
    with torch.no_grad(): assert_close(F.embedding(mix_lookups(plan, x), w), by_weight(plan, lambda j: w[x[j]]))

class Twice(Callback):
    "A second gradient at the same place, as of sharpness-aware minimisation with ρ = 0"
    run_valid = False
    def before_fit(self): self.grads = []
    def before_step(self):
        first = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        self.model.zero_grad()
        self.learn.loss_func(self.model(*self.learn.xb), *self.learn.yb).backward()
        self.grads.append((first,[p.grad.clone() for p in self.model.parameters() if p.grad is not None]))

def test_a_second_gradient_of_the_batch_is_the_first():
    quiet_fit(mk_learn(mk_dls([ints(9, 32, 6)], [y]), Own(lambda m,x: m.emb(x)), cbs=[MixUp(1.), twice := Twice()]))
    assert len(twice.grads)==4
    for first,second in twice.grads:
        for a,b in zip(first, second): assert_close(a, b)

def test_integers_of_a_compiled_model_are_refused():
    "But what comes behind its embeddings may be compiled"
    dls = mk_dls([torch.randint(0, 20, (16,6))], [torch.arange(16)%4])
    def net(): return nn.Sequential(nn.Sequential(nn.Embedding(20, 8), nn.Flatten()), nn.Linear(48, 4))
    part,head = net(),net()
    part[0].compile(backend='eager')
    head[1].compile(backend='eager')
    for model in torch.compile(net(), backend='eager'),part:
        with pytest.raises(TypeError, match='cannot be followed into a compiled model.*_orig_mod'): quiet_fit(mk_learn(dls, model, cbs=MixUp(1.)))
    quiet_fit(mk_learn(dls, head, cbs=MixUp(1.)))

# Padding, one-hot mixtures and bags
class Gated(nn.Module):
    "A text, and a flag that is compared"
    def __init__(self, flag):
        super().__init__()
        self.emb,self.out,self.flag = nn.Embedding(9, 4, padding_idx=0),nn.Linear(4, 4),flag
    def forward(self, t, f): return self.out(self.emb(t).sum(1)*self.flag(t, f).float())

@pytest.mark.parametrize('flag', [lambda t,f: f==1, lambda t,f: f==0, lambda t,f: f!=0], ids=['one','zero','not zero'])
def test_padding_of_a_text_is_none_of_other_inputs(flag):
    dls = mk_dls([torch.randint(1, 9, (32,3)),(torch.arange(32)%2)[:,None]], [torch.arange(32)%4], n_inp=2)
    with pytest.raises(TypeError, match='tells the parts of a mixture apart'): quiet_fit(mk_learn(dls, Gated(flag), cbs=MixUp(1.)))

class Segments(nn.Module):
    "A text, and the segments of its words: a first and a second sentence"
    def __init__(self, look):
        super().__init__()
        self.words,self.segments,self.out,self.look = nn.Embedding(9, 4, padding_idx=0),nn.Embedding(2, 4),nn.Linear(4, 4),look
    def forward(self, t, s): return self.out((self.words(t)*(t!=0)[...,None] + self.look(self, s)).sum(1))

def test_segments_that_look_padded_are_none():
    "0s in front of 1s, and another embedding whose padding is 0: compared, they are refused; looked up, they are mixed"
    def learn(look): return mk_learn(mk_dls([torch.randint(1, 9, (32,6)),segments], [torch.arange(32)%4], n_inp=2), Segments(look), cbs=MixUp(1.))
    segments = (torch.arange(6)>=torch.randint(1, 6, (32,1))).long()
    for look in [lambda m,s: (s==1)[...,None].float(), lambda m,s: m.segments(s)*(s>0)[...,None], lambda m,s: m.words(s[:,0])[:,None]*(s!=0)[...,None]]:
        with pytest.raises(TypeError, match='tells the parts of a mixture apart. .*padding_idx'): quiet_fit(learn(look))
    quiet_fit(learn(lambda m,s: m.segments(s)))

@pytest.mark.parametrize('x,padded', [([[4,5,0],[7,0,0]],2), ([[0,0,3],[0,4,5]],2), ([[0,3,0],[1,2,3]],1), ([[3,0,4],[1,2,0]],0),
    ([[0,0,0],[1,2,3]],0), ([[0],[3]],0), ([0,3],0)], ids=['behind','in front','both','between','nothing else','a column','one integer'])
def test_where_a_text_is_padded(x, padded): assert is_padding(torch.tensor(x), [0]).any(-1).sum()==padded

casts = [lambda o: o.bool(), lambda o: o>0, lambda o: o==1, lambda o: o.long(), lambda o: o.byte(), lambda o: o.to(torch.int32), lambda o: o.argmax(-1),
    lambda o: o.flatten(1).bool(), lambda o: o.nonzero()]

@pytest.mark.parametrize('f', casts, ids=range(len(casts)))
def test_one_hot_mixtures_are_not_counted(f):
    x = mix_lookups(Plan.of(torch.tensor([1,0]), torch.tensor([.7])), torch.tensor([[1,3],[2,3]]))
    with pytest.raises(TypeError, match='turns one-hot mixtures into'): f(F.one_hot(x, 5))

@pytest.mark.parametrize('f', [lambda o: o.float().flatten(1), lambda o: o.transpose(1, 2)*2., lambda o: o.to(torch.float32)@torch.ones(5, 3),
    lambda o: F.linear(1.*o, torch.eye(5))], ids=range(4))
def test_one_hot_mixtures_are_computed_with(f):
    x,lam = torch.tensor([[1,3],[2,3]]),.7
    got = f(F.one_hot(mix_lookups(Plan.of(torch.tensor([1,0]), torch.tensor([lam])), x), 5))
    assert_close(got.as_subclass(Tensor), f(lam*F.one_hot(x, 5) + (1-lam)*F.one_hot(x.flip(0), 5)))

def test_a_bag_whose_rows_have_several_weights():
    w = torch.rand(9, 4)
    x = mix_lookups(Plan.of(torch.arange(4).roll(1), torch.linspace(.5, 1., 4)), torch.randint(0, 9, (4,4)))
    F.embedding_bag(x, w)
    with pytest.raises(TypeError, match='embedding_bag cannot be followed'): F.embedding_bag(x.T, w)

# A table in one pass
def table_model(): return TabularModel([(5,3),(7,4),(4,2)], n_cont=2, out_sz=3, layers=[8], embed_p=0., bn_cont=False, use_bn=False)

@pytest.mark.parametrize('mixer', [MixUp(1.), MixUp(1., per_batch=True), MixUp(1., p=.5), OneOf(MixUp(1.), None, per_batch=False), MixUp(1., k=3)], ids=repr)
def test_a_table_in_one_pass(mixer):
    "Values and gradients are those of vectors that are looked up for each part and mixed"
    torch.manual_seed(0)
    model,cats,nums = table_model(),torch.stack([torch.randint(c, (16,)) for c in (5,7,4)], 1),torch.randn(16, 2)
    plan = mixer.draw((cats,nums))
    inputs = MixedInputs(plan, (cats,nums), model)
    assert type(inputs.xs[0]) is (StackedParts if plan.k==2 else Lookups) and inputs.xs[0].shape==cats.shape and len(inputs.xs[0])==16
    out = model(*inputs.xs)
    rows = torch.cat([e(cats[:,i]) for i,e in enumerate(model.embeds)], 1)
    want = model.layers(torch.cat([sum(w[:,None]*rows[j] for w,j in zip(plan.sample_weights.T, plan.pairs.T)), plan.mix(nums)], 1))
    assert_close(out, want)
    g,ps = torch.randn(16, 3),list(model.parameters())
    for a,b in zip(torch.autograd.grad(out, ps, g), torch.autograd.grad(want, ps, g)): assert_close(a, b)

def test_a_table_whose_embeddings_are_watched():
    "Hooks, other operations and another `forward` get `Lookups`"
    model,cats,nums,plan = table_model(),torch.randint(4, (8,3)),torch.randn(8, 2),Plan.of(torch.arange(8).roll(1), torch.rand(8))
    plain = MixedInputs(plan, (cats,nums), model).xs
    want = model(*plain)
    assert isinstance(plain[0][:,:2], Lookups) and isinstance(plain[0].flip(1), Lookups) and isinstance(plain[0][:,1:2], Lookups)
    assert plain[0][:,0].shape==(8,) and torch.stack([plain[0][:,0],plain[0][:,2]], 1).shape==(8,2)
    with pytest.raises(TypeError, match='tells the parts of a mixture apart'): plain[0][:,1]==cats[:,1]
    for other in copy.copy(plain[0]),pickle.loads(pickle.dumps(plain[0])),plain[0].as_subclass(Tensor):   # no unmixed categories
        with pytest.raises(IndexError): model(other, nums)
    seen = []
    model.embeds[1].register_forward_hook(lambda m, args, out: seen.append(out))
    watched = MixedInputs(plan, (cats,nums), model).xs
    assert isinstance(watched[0], Lookups)
    assert_close(model(*watched), want)
    assert_close(seen[0], plan.mix(model.embeds[1](cats[:,1])))
    class Twice(TabularModel):
        def forward(self, x_cat, x_cont): return 2*super().forward(x_cat, x_cont)
    model.__class__ = Twice
    assert isinstance(MixedInputs(plan, (cats,nums), model).xs[0], Lookups)
