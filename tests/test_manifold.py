"Mixing behind hidden layers: where, once, exactly, and for no other batch"
import pickle
from copy import deepcopy
import pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.rnn import RNNCallback
from fastai.losses import CrossEntropyLossFlat
from fastai.tabular.model import TabularModel
from fastai.text.models.awdlstm import AWD_LSTM
from fastai.text.models.core import get_text_classifier
from fastai.torch_core import set_seed
from fastai.vision.all import DynamicUnet, resnet18, xresnet18
from fastai.vision.learner import create_body, create_vision_model
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torchvision.models import densenet121, vgg11
from fastmix import show
from fastmix.data import digit_images, image_dls
from fastmix.manifold import ManifoldMixUp, _find_layers, _has_way_around, stages
from fastmix.mixers import MixUp
from fastmix.partners import SecondLoader
from helpers import Record, class_dls, mk_dls, mk_learn, quiet_fit

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4))

def layers_of(record): return [b['plan'].layer for b in record.batches]
def is_clean(model): return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
def mixed_rows(plan, h): return torch.stack([sum(w*h[j] for w,j in zip(ws, js)) for ws,js in zip(plan.weights, plan.pairs)])

class Gradients(Callback):
    def before_fit(self): self.grads = []
    def before_step(self): self.grads.append([p.grad.clone() for p in self.model.parameters()])

# Exactly

@pytest.mark.parametrize('k', [2,3])
def test_the_rest_of_the_model_is_called_with_mixtures(k):
    "The predictions, the loss and the gradients of a model that is taken apart by hand"
    model = net()
    learn = mk_learn(class_dls(), model, cbs=[ManifoldMixUp(1., k=k), record := Record(), gradients := Gradients()])
    quiet_fit(learn, 6, lr=0.)
    assert set(layers_of(record))=={'input','1','3'}
    for b,grads in zip(record.batches, gradients.grads):
        plan,(x,),(y,) = b['plan'],b['xb'],b['yb']
        cut = 0 if plan.layer=='input' else int(plan.layer)+1
        pred = model[cut:](mixed_rows(plan, model[:cut](x)))
        loss = nn.functional.cross_entropy(pred, mixed_rows(plan, nn.functional.one_hot(y, 4)))
        assert_close((b['pred'],b['loss']), (pred,loss.detach()))
        assert_close(grads, list(torch.autograd.grad(loss, list(model.parameters()))))
    assert is_clean(model) and learn.manifold_mix_up.record is None

def test_partners_from_a_second_loader_go_through_the_layer():
    items = list(zip(torch.randn(12, 6), torch.randint(0, 4, (12,))))
    dl = torch.utils.data.DataLoader(items, batch_size=5)
    model = net()
    learn = mk_learn(class_dls(), model, cbs=[ManifoldMixUp(1., layers=[model[1]], partners=SecondLoader(dl)), record := Record()])
    quiet_fit(learn, 1, lr=0.)
    b = record.batches[0]
    h = model[:2](torch.cat([b['xb'][0], torch.stack([o[0] for o in items[:5]])]))
    assert_close(b['pred'], model[2:](mixed_rows(b['plan'], h)))

class TwoWays(nn.Module):
    "Words, and a mask of padding that goes around the layer"
    def __init__(self):
        super().__init__()
        self.words,self.layer,self.out = nn.Embedding(9, 4, padding_idx=0),nn.Linear(4, 4),nn.Linear(4, 4)
    def forward(self, x): return self.pool(self.layer(self.words(x)), x)
    def pool(self, h, x): return self.out((h*(x!=0)[...,None]).sum(1)/(x!=0).sum(1, keepdim=True))

def test_samples_stay_in_their_order():
    "What goes around the layer is that of the sample itself"
    g = torch.Generator().manual_seed(0)
    x = torch.randint(1, 9, (32,6), generator=g)
    for o,n in zip(x, torch.randint(1, 6, (32,), generator=g)): o[n:] = 0
    model = TwoWays()
    learn = mk_learn(mk_dls([x], [torch.arange(32)%4]), model, cbs=[ManifoldMixUp(1., layers='layer'), record := Record()])
    quiet_fit(learn, lr=0.)
    for b in record.batches: assert_close(b['pred'], model.pool(mixed_rows(b['plan'], model.layer(model.words(b['xb'][0]))), b['xb'][0]))

@pytest.mark.parametrize('use_reentrant', [True,False])
def test_checkpointed_layers(use_reentrant):
    "Have the gradients of those that are not"
    class Net(nn.Module):
        def __init__(self, saves):
            super().__init__()
            self.net,self.saves = net(),saves
        def forward(self, x):
            body = self.net[:4]
            return self.net[4](checkpoint(body, x.requires_grad_(), use_reentrant=use_reentrant) if self.saves else body(x))
    runs = []
    for saves in True,False:
        set_seed(4)
        quiet_fit(mk_learn(class_dls(), Net(saves), cbs=[ManifoldMixUp(1., layers='net.1'), gradients := Gradients()]))
        runs.append(gradients.grads)
    assert_close(*runs)

def test_alpha_zero_is_off():
    models = net(),net()
    for model,cbs in zip(models, (ManifoldMixUp(0),None)): quiet_fit(mk_learn(class_dls(), model, cbs=cbs), 2)
    for p,q in zip(*(m.parameters() for m in models)): assert p.equal(q)

def test_set_seed_repeats():
    runs = []
    for _ in range(2):
        learn = mk_learn(class_dls(), net(), cbs=[ManifoldMixUp(1.), record := Record()])
        set_seed(4)
        quiet_fit(learn, 3)
        runs.append(layers_of(record))
    assert runs[0]==runs[1] and len(set(runs[0]))==3

# Which layers

def test_stages_of_known_models():
    "Never within a residual block, and not the last"
    assert stages(create_vision_model(resnet18, 3, pretrained=False))==['0.4','0.5','0.6']
    assert stages(xresnet18())==['0','1','2','4','5','6']
    assert stages(TabularModel([(3,2)], 2, 2, [9,5]))==['layers.0','layers.1']
    assert stages(get_text_classifier(AWD_LSTM, 50, 2))==['1.layers.0']
    for arch in vgg11,densenet121:
        model = create_vision_model(arch, 3, pretrained=False)
        assert len(found := stages(model))>2 and all(o.startswith('0.0.') for o in found)
        reached = []
        for o in found: model.get_submodule(o).register_forward_hook(lambda *_: reached.append(1))
        model(torch.randn(4, 3, 64, 64))
        assert len(reached)==len(found)
    unet = DynamicUnet(create_body(resnet18(), pretrained=False), 2, (32,32))
    for model in unet,nn.Linear(2, 2),nn.Sequential(nn.Linear(2, 2), nn.Sigmoid()): assert stages(model)==[]

def test_layers_by_name_pattern_and_module():
    model = net()
    assert _find_layers(model, ['input','[13]',model[1],'0'])==['input','1','3','0']

@pytest.mark.parametrize('layers,what', [(['body'], "'body', which is not a layer of the model: its layers are input, 0, 1, 2, 3, 4"), ([nn.ReLU()], 'ReLU'), ([], 'layers must name')])
def test_unknown_layers_are_named(layers, what):
    learn = mk_learn(class_dls(), net(), cbs=ManifoldMixUp(layers=layers))
    own = learn.loss_func
    with pytest.raises(ValueError, match=what): learn.fit(1)
    assert learn.loss_func is own

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc,self.spare,self.head = nn.Linear(6, 5),nn.Linear(6, 5),nn.Linear(5, 4)
    def forward(self, x): return self.head(self.enc(x))

def test_a_model_without_known_stages():
    with pytest.raises(ValueError, match='where a Own can be mixed: pass layers, such as enc, spare, head'): mk_learn(class_dls(), Own(), cbs=ManifoldMixUp()).fit(1)
    quiet_fit(mk_learn(class_dls(), Own(), cbs=ManifoldMixUp(layers='enc')))

def test_categories_and_tokens():
    "Are mixed behind the embedding, never as an input"
    g = torch.Generator().manual_seed(0)
    cat,cont,y = torch.randint(0, 3, (32,1), generator=g), torch.randn(32, 2, generator=g), torch.randint(0, 2, (32,), generator=g)
    learn = mk_learn(mk_dls([cat,cont], [y], n_inp=2), TabularModel([(3,2)], 2, 2, [9,5]), cbs=[ManifoldMixUp(), record := Record()])
    quiet_fit(learn, 3)
    assert set(layers_of(record))=={'layers.0','layers.1'}
    tokens = torch.randint(2, 50, (32,12), generator=g)
    learn = mk_learn(mk_dls([tokens], [y]), get_text_classifier(AWD_LSTM, 50, 2), cbs=[ManifoldMixUp(), RNNCallback(), record := Record()])
    quiet_fit(learn, 1)
    assert set(layers_of(record))=={'1.layers.0'}

def test_images_of_the_mixtures_before_a_fit():
    learn = mk_learn(image_dls(*digit_images(), bs=8), nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(64, 10)), cbs=ManifoldMixUp(1.))
    learn.show_mix(max_n=4)
    learn.dls.show_mix(ManifoldMixUp(1.), max_n=4)
    plt = show.plt
    assert is_clean(learn.model) and sum(' + ' in ax.get_title() for fig in map(plt.figure, plt.get_fignums()) for ax in fig.axes)>4
    plt.close('all')

# What cannot be mixed

class TwoCalls(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer,self.head = nn.Linear(6, 6),nn.Linear(6, 4)
    def forward(self, x): return self.head(self.layer(self.layer(x)))

class TimesFirst(nn.Module):
    "With as many time steps as samples, only `batch_first` tells one from the other"
    def __init__(self, batch_first=False):
        super().__init__()
        self.batch_first,self.layer,self.out = batch_first,nn.TransformerEncoderLayer(4, 1, 8, batch_first=batch_first),nn.Linear(4, 4)
    def forward(self, x): return self.out(self.layer(x).mean(1) if self.batch_first else self.layer(x.transpose(0, 1)).mean(0))

class Attends(nn.Module):
    "Attention over pixels, within a layer that returns images"
    def __init__(self):
        super().__init__()
        self.a = nn.MultiheadAttention(8, 1)
    def forward(self, x):
        h = x.flatten(2).permute(2, 0, 1)
        return self.a(h, h, h)[0].permute(1, 2, 0).view(x.shape)

class Doubled(Callback):
    order = 20
    def before_batch(self): self.learn.xb = tuple(2*x for x in self.xb)

@pytest.mark.parametrize('model,size,layer,error,what', [
    (Own, 6, 'spare', RuntimeError, 'did not reach its layer spare'),
    (lambda: nn.Sequential(nn.LSTM(6, 5), nn.Identity()), 6, '0', TypeError, 'layer 0 returns a tuple'),
    (lambda: nn.Sequential(nn.Unflatten(1, (2,3)), nn.Flatten(0, 1), nn.Linear(3, 4)), 6, '1', TypeError, r'layer 1 returns a tensor of shape \(16, 3\), which lacks one row for each of the 8'),
    (TwoCalls, 6, 'layer', TypeError, 'layer is called more than once'), (TimesFirst, (8,4), 'layer', TypeError, 'layer returns as many time steps as samples, and is not batch_first'),
    (lambda: TimesFirst(batch_first=True), (8,4), 'layer', None, ''), (lambda: nn.Sequential(Attends(), nn.Flatten(), nn.Linear(32, 4)), (8,2,2), '0', None, '')])
def test_what_cannot_be_mixed_is_named(model, size, layer, error, what):
    "And leaves no hooks"
    x,model = torch.randn(32, *([size] if isinstance(size, int) else size)),model()
    learn = mk_learn(mk_dls([x], [torch.arange(32)%4]), model, cbs=ManifoldMixUp(layers=layer))
    if not error: return quiet_fit(learn)
    with pytest.raises(error, match=what): learn.fit(1)
    assert is_clean(model)

def test_inputs_that_another_callback_replaces():
    learn = mk_learn(class_dls(), net(), cbs=[ManifoldMixUp(layers='1'), Doubled()])
    with pytest.raises(RuntimeError, match='with the inputs of this batch.*at an `order` below 9.5'): learn.fit(1)
    assert is_clean(learn.model)

# For no other batch

class Bomb(nn.Module):
    live = False
    def forward(self, x):
        if self.live: raise KeyboardInterrupt
        return x

def stop(grad): raise KeyboardInterrupt
class StopsBackward(Callback):
    def before_backward(self): self.learn.loss_grad.register_hook(stop)
class ReplacesTargets(Callback):
    order,run_valid = 20,False
    def before_batch(self): self.learn.yb = tuple(o.clone() for o in self.yb)

@pytest.mark.parametrize('bomb,cb,for_this_fit,error', [(1,None,False,KeyboardInterrupt), (3,None,True,KeyboardInterrupt),
    (None,StopsBackward(),False,KeyboardInterrupt), (None,ReplacesTargets(),False,RuntimeError)], ids=['before','behind','backward','loss'])
def test_an_interrupted_batch_leaves_nothing_that_mixes(bomb, cb, for_this_fit, error):
    model,mixer = nn.Sequential(nn.Linear(6, 9), Bomb(), nn.ReLU(), Bomb(), nn.Linear(9, 4)),ManifoldMixUp(1., layers='2')
    learn = mk_learn(class_dls(), model, cbs=[] if for_this_fit else mixer)
    if bomb: model[bomb].live = True
    with pytest.raises(error): learn.fit(1, cbs=mixer if for_this_fit else cb)
    if bomb: model[bomb].live = False
    x = torch.randn(8, 6)
    want = nn.functional.linear(nn.functional.linear(x, model[0].weight, model[0].bias).relu(), model[4].weight, model[4].bias)
    for o in model,pickle.loads(pickle.dumps(model)),deepcopy(model): assert_close(o(x), want)
    assert is_clean(model) or not for_this_fit
    learn.validate()
    quiet_fit(learn)
    assert is_clean(model)

class Again(Callback):
    "Calls the model again between its prediction and the backward pass: with the batch, with something else, and in part"
    run_valid = False
    def after_loss(self):
        x = torch.ones_like(self.x)
        with torch.no_grad(): self.again,self.pred_,self.other,self.part = self.model(*self.xb),self.pred,self.model(x),self.model[:2](self.x)
        with torch.no_grad(): assert_close((self.other,self.part), (self.learn.unhooked(x),self.learn.unhooked[:2](self.x)))

def test_another_call_before_the_backward_pass():
    "With the batch it is mixed as before, with anything else it is not"
    model = net()
    learn = mk_learn(class_dls(), model, cbs=[ManifoldMixUp(1., layers='1'), again := Again()])
    learn.unhooked = deepcopy(model)
    quiet_fit(learn, lr=0.)
    assert_close(again.again, again.pred_.detach())

def test_predictions_in_the_middle_of_a_batch_are_not_mixed():
    class Predicts(Callback):
        run_valid = False
        def after_loss(self):
            x = torch.stack([o[0] for o in self.dls.valid_ds])
            with torch.no_grad(): want = pickle.loads(pickle.dumps(self.learn.model)).eval()(x)
            assert_close(self.learn.get_preds(inner=True)[0], want)
            raise CancelFitException
    learn = mk_learn(class_dls(), net(), cbs=[Predicts(), ManifoldMixUp(1., layers='1')])
    with learn.no_bar(): quiet_fit(learn)

def test_in_any_engine():
    "Without a learner, and where the parts of a model are called one by one"
    model,x,y = net(),torch.randn(8, 6),torch.arange(8)%4
    record = ManifoldMixUp(1., layers='3').mix_batch((x,), (y,), nn.CrossEntropyLoss(), model)
    h, = record.mixed_xb
    for part in model: h = part(h)
    record.inputs.check()
    record.close()
    assert is_clean(model) and record.mixed_xb[0] is x
    assert_close(h, model[4](mixed_rows(record.plan, model[:4](x))))

# Models whose layers do not come one after the other

class TwoPaths(nn.Module):
    "A wide path beside a deep one"
    def __init__(self):
        super().__init__()
        self.layers,self.wide = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)),nn.Sequential(nn.Linear(6, 4))
    def forward(self, x): return self.layers(x) + self.wide(x)

class Residual(nn.Sequential):
    def forward(self, x): return x + super().forward(x)

class TwoTables(TabularModel):
    def forward(self, x_cat, x_cont): return super().forward(x_cat, x_cont) + x_cont[:,:1]

@pytest.mark.parametrize('model', [TwoPaths(), Residual(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), TwoTables([(3,2)], 4, 1, [5]),
    nn.Sequential(nn.Linear(6, 6), TwoPaths())], ids=['two paths','residual','table','last part'])
def test_a_second_path_is_no_chain(model):
    assert not [o for o in stages(model) if 'layers' in o or not isinstance(model[0] if isinstance(model, nn.Sequential) else model, nn.Linear)]
    if stages(model): return
    with pytest.raises(ValueError, match='unknown where a .* can be mixed: pass layers'): _find_layers(model)

@pytest.mark.parametrize('make', [lambda m: torch.compile(m, backend='eager'), lambda m: m.compile(backend='eager') or m], ids=['torch.compile','in place'])
def test_compiled_models_are_refused(make):
    learn = mk_learn(class_dls(), make(net()), cbs=ManifoldMixUp(1.))
    with pytest.raises(TypeError, match='is compiled, or part of a compiled model.*learn.model._orig_mod'): quiet_fit(learn)
    model = net()
    model[4].compile(backend='eager')
    quiet_fit(mk_learn(class_dls(), model, cbs=ManifoldMixUp(1.)))   # behind all layers that are mixed

def test_a_text_with_its_mask():
    "The way that the error for masks names: mixed behind the embedding, with each sample's own mask"
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb,self.out = nn.Embedding(20, 8),nn.Linear(8, 4)
        def forward(self, tokens, mask):
            w = mask.float()[...,None]
            return self.out((self.emb(tokens)*w).sum(1)/w.sum(1))
    tokens,y = torch.randint(0, 20, (32,6)),torch.arange(32)%4
    for mask in (torch.arange(6)<torch.randint(1, 7, (32,1))).long(),torch.arange(6)<torch.randint(1, 7, (32,1)):
        dls = mk_dls([tokens,mask], [y], n_inp=2)
        with pytest.raises(TypeError, match=r'ManifoldMixUp\(layers=...\)'): quiet_fit(mk_learn(dls, Masked(), cbs=MixUp(1.)))
        learn = mk_learn(dls, model := Masked(), cbs=[ManifoldMixUp(1., layers='emb'), Record()])
        for b in quiet_fit(learn, lr=0.).record.batches:
            (t,m),plan = b['xb0'],b['plan']
            h,w = mixed_rows(plan, model.emb(t)),m.float()[...,None]
            assert_close(b['pred'], model.out((h*w).sum(1)/w.sum(1)))

# A way around the layer

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.deep,self.out,self.wide = nn.Linear(6, 9),nn.Linear(9, 4),nn.Linear(6, 4)
    def forward(self, x): return self.out(self.deep(x).relu()) + .1*self.wide(x)

@pytest.mark.parametrize('layers', ['deep','out'])
def test_a_layer_with_a_way_around_it_is_refused(layers):
    learn = mk_learn(class_dls(), Wide(), cbs=ManifoldMixUp(1., layers=layers))
    before = [o.clone() for o in learn.model.parameters()]
    with pytest.raises(ValueError, match=f'goes through the layer {layers}.*no way around'): quiet_fit(learn)
    assert all(map(torch.equal, before, learn.model.parameters())) and is_clean(learn.model) and learn.model.training

def test_the_skips_of_a_unet():
    x = torch.rand(8, 3, 32, 32)
    dls = mk_dls([x], [(x[:,0]>.5).long()], bs=4)
    for layer in 'layers.0','layers.4':
        model = DynamicUnet(create_body(resnet18(weights=None), cut=-2), 2, (32,32))
        with pytest.raises(ValueError, match='no way around'): quiet_fit(mk_learn(dls, model, CrossEntropyLossFlat(axis=1), cbs=ManifoldMixUp(1., layers=layer)))

def test_looking_for_a_way_around_changes_nothing():
    "Statistics, modes, and random numbers"
    def mk(): return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(), nn.Linear(9, 4))
    torch.manual_seed(0)
    model = mk()
    model[1].eval()
    x,state,random = torch.rand(8, 6),deepcopy(model.state_dict()),torch.get_rng_state()
    assert _has_way_around(model, '1', (x,)) is False
    assert all(map(torch.equal, state.values(), model.state_dict().values())) and torch.get_rng_state().equal(random)
    assert not model[1].training and model[2].training and is_clean(model)

def test_one_activation_that_is_used_twice():
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(6, 9), act, nn.Linear(9, 9), act, nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4))
    assert stages(model)==['5']
    quiet_fit(mk_learn(class_dls(), model, cbs=ManifoldMixUp(1.)))

def test_a_second_call_is_computed_again_as_it_was():
    "With reentrant checkpoints: gradients are those without"
    class Body(nn.Module):
        def __init__(self, again):
            super().__init__()
            torch.manual_seed(0)
            self.a,self.b,self.again = nn.Linear(6, 9),nn.Linear(9, 4),again
        def body(self, x): return self.a(x).tanh()
        def forward(self, x): return self.b(checkpoint(self.body, x.requires_grad_(), use_reentrant=True) if self.again else self.body(x))
    class Extra(Callback):
        run_valid = False
        def after_loss(self): self.learn.loss_grad = self.learn.loss_grad + self.learn.model(torch.linspace(-1, 1, 48).view(8, 6)).square().mean()
    got,want = (quiet_fit(mk_learn(class_dls(), Body(again), cbs=[ManifoldMixUp(1., layers='a'), Extra(), Gradients()])).gradients.grads for again in (True,False))
    for o in zip(got, want):
        for a,b in zip(*o): assert_close(a, b)

class Aux(nn.Module):
    "A second output in training"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.drop,self.out,self.aux = nn.Linear(6, 9),nn.Linear(9, 9),nn.Dropout(),nn.Linear(9, 4),nn.Linear(9, 4)
    def forward(self, x):
        h = self.drop(self.a(x).relu())
        p = self.out(self.b(h).relu())
        return (p,self.aux(h)) if self.training else p

@pytest.mark.parametrize('layer,ok', [('a',True), ('b',False)])
def test_outputs_that_are_there_in_training_only(layer, ok):
    def both(p, y): return F.cross_entropy(p[0], y) + F.cross_entropy(p[1], y) if isinstance(p, tuple) else F.cross_entropy(p, y)
    learn = mk_learn(class_dls(), Aux(), both, cbs=ManifoldMixUp(1., layers=layer))
    if ok: quiet_fit(learn)
    else:
        with pytest.raises(ValueError, match='no way around'): quiet_fit(learn)

def test_a_last_layer_of_zeros_hides_nothing_for_long():
    model = Wide()
    for o in (*model.out.parameters(),*model.wide.parameters()): nn.init.zeros_(o)
    with pytest.raises(ValueError, match='no way around'): quiet_fit(mk_learn(class_dls(), model, cbs=ManifoldMixUp(1., layers='deep')))

class Noisy(nn.Module):
    "Random in evaluation, too"
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(6, 9),nn.Linear(9, 4)
    def forward(self, x):
        h = self.a(x)
        return self.b(h+torch.randn_like(h))

class TimesOut(nn.Module):
    "Times in front in what it returns, and a matrix of the batch"
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(6, 9),nn.Linear(9, 4*16)
    def forward(self, x):
        h = self.a(x)
        return self.b(h).view(-1, 16, 4).transpose(0, 1),h@h.T

@pytest.mark.parametrize('model,loss_func', [(Noisy(), nn.CrossEntropyLoss()), (TimesOut(), lambda p,y: F.cross_entropy(p[0][0], y))], ids=['random','times'])
def test_layers_without_a_way_around_are_taken(model, loss_func): quiet_fit(mk_learn(class_dls(), model, loss_func, cbs=ManifoldMixUp(1., layers='a')))

def test_layers_that_get_their_size_from_a_batch():
    quiet_fit(mk_learn(class_dls(), nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(4)), cbs=ManifoldMixUp(1., layers=['0'])))

def test_looking_for_a_way_around_sets_modes_only():
    class Merges(nn.Linear):
        merged = False
        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)
    model = nn.Sequential(Merges(6, 9), nn.ReLU(), nn.Linear(9, 4))
    class Look(Callback):
        run_valid = False
        def after_pred(self): assert not model[0].merged
    quiet_fit(mk_learn(class_dls(), model, cbs=[ManifoldMixUp(1., layers='0'), Look()]))

def test_noise_before_a_layer():
    class Noise(nn.Module):
        def forward(self, x): return x + .1*torch.randn_like(x)
    quiet_fit(mk_learn(class_dls(), nn.Sequential(Noise(), nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)), cbs=ManifoldMixUp(1., layers='2')))
