"Mixing behind hidden layers: where, once, exactly, and for no other batch"
import pickle
import pytest, torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.rnn import RNNCallback
from fastai.tabular.model import TabularModel
from fastai.text.models.awdlstm import AWD_LSTM
from fastai.text.models.core import get_text_classifier
from fastai.torch_core import set_seed
from fastai.vision.all import DynamicUnet, resnet18, xresnet18
from fastai.vision.learner import create_body, create_vision_model
from torch import nn
from torch.testing import assert_close
from torchvision.models import densenet121, vgg11
from fastmix.callback import OneOf
from fastmix.core import other_class
from fastmix.data import SecondLoader
from fastmix.manifold import ManifoldMixUp, find_layers, stages
from helpers import Record, class_dls, mk_dls, mk_learn, quiet_fit

def net(): return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4))
class See(Callback):
    order = 2
    def before_fit(self): self.layers = []
    def after_pred(self):
        if self.training: self.layers.append(self.manifold_mix_up.layer)

@pytest.mark.parametrize('k', [2,3])
def test_what_the_rest_of_the_network_sees(k):
    "The network taken apart by hand"
    torch.manual_seed(0)
    model = net()
    learn = mk_learn(class_dls(), model, cbs=[ManifoldMixUp(1., k=k), record := Record(), see := See()])
    quiet_fit(learn, 6, lr=0.)
    assert set(see.layers)=={'input','1','3'}
    model.train()
    for b,layer in zip(record.batches, see.layers):
        cut = 0 if layer=='input' else int(layer)+1
        h = model[:cut](b['xb'][0])
        shares = b['plan'].shares
        h = torch.stack([sum(w*h[j] for w,j in zip(ws, js)) for ws,js in zip(shares, b['plan'].pairs)])
        assert_close(b['pred'], model[cut:](h))
        t = torch.stack([sum(w*nn.functional.one_hot(b['yb'][0][j], 4) for w,j in zip(ws, js)) for ws,js in zip(shares, b['plan'].pairs)])
        assert_close(b['loss'], nn.functional.cross_entropy(b['pred'].detach(), t))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

def test_gradients_reach_both_samples():
    model,x = net(), torch.randn(8, 6)
    learn = mk_learn(mk_dls([x], [torch.arange(8)%4]), model, cbs=[ManifoldMixUp(1., layers='0', partners=other_class)])
    quiet_fit(learn, 1, lr=0.)
    torch.manual_seed(0)
    before = [p.clone() for p in model.parameters()]
    quiet_fit(learn, 1, lr=.1)
    assert all(not p.equal(q) for p,q in zip(before, model.parameters()))

def test_stages_of_known_models():
    "Never within a residual block, and not the last"
    body = create_body(resnet18(), pretrained=False)
    assert stages(create_vision_model(resnet18, 3, pretrained=False))==['0.4','0.5','0.6']
    assert stages(xresnet18())==['0','1','2','4','5','6']
    assert stages(TabularModel([(3,2)], 2, 2, [9,5]))==['layers.0','layers.1']
    assert stages(get_text_classifier(AWD_LSTM, 50, 2))==['1.layers.0']
    assert stages(DynamicUnet(body, 2, (32,32)))==[]
    for arch in vgg11,densenet121:
        model = create_vision_model(arch, 3, pretrained=False)
        assert len(found := stages(model))>2 and all(o.startswith('0.0.') for o in found)
        x,seen = torch.randn(4, 3, 64, 64), []
        for o in find_layers(model, found).values(): o.register_forward_hook(lambda m,i,h: seen.append(h.shape))
        model(x)
        assert len(seen)==len(found)
    assert stages(nn.Linear(2, 2))==[] and stages(nn.Sequential(nn.Linear(2, 2), nn.Sigmoid()))==[]

def test_inputs_that_can_not_be_mixed():
    "Categories and tokens, mixed behind the embedding"
    g = torch.Generator().manual_seed(0)
    cat,cont,y = torch.randint(0, 3, (32,1), generator=g), torch.randn(32, 2, generator=g), torch.randint(0, 2, (32,), generator=g)
    learn = mk_learn(mk_dls([cat,cont], [y], n_inp=2), TabularModel([(3,2)], 2, 2, [9,5]), cbs=[ManifoldMixUp(), see := See()])
    quiet_fit(learn, 3)
    assert set(see.layers)=={'layers.0','layers.1'}
    tokens = torch.randint(2, 50, (32,12), generator=g)
    learn = mk_learn(mk_dls([tokens], [y]), get_text_classifier(AWD_LSTM, 50, 2), cbs=[ManifoldMixUp(), RNNCallback(), see := See()])
    quiet_fit(learn, 1)
    assert set(see.layers)=={'1.layers.0'}

def test_partners_from_a_second_loader_go_through_the_layer():
    items = list(zip(torch.randn(12, 6), torch.randint(0, 4, (12,))))
    dl = torch.utils.data.DataLoader(items, batch_size=5)
    model = net()
    learn = mk_learn(class_dls(), model, cbs=[ManifoldMixUp(1., layers=[model[1]], partners=SecondLoader(dl)), record := Record()])
    quiet_fit(learn, 1, lr=0.)
    b = record.batches[0]
    h,lam = model[:2](torch.cat([b['xb'][0], torch.stack([o[0] for o in items[:5]])])), b['plan'].lam[:,None]
    assert_close(b['pred'], model[2:](lam*h[:8] + (1-lam)*h[b['plan'].idx]))

@pytest.mark.parametrize('layers,what', [(['body'], "'body', which is no layer of the model: it has input, 0, 1, 2, 3, 4"), ([nn.ReLU()], 'ReLU'), ([], 'layers must name'), ('9*', '9')])
def test_unknown_layers_are_named(layers, what):
    learn = mk_learn(class_dls(), net(), cbs=ManifoldMixUp(layers=layers))
    own = learn.loss_func
    with pytest.raises(ValueError, match=what): learn.fit(1)
    assert learn.loss_func is own

def test_a_model_without_known_stages():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc,self.spare,self.head = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 4)
        def forward(self, x): return self.head(self.enc(x))
    with pytest.raises(ValueError, match='name layers, of enc, spare, head'): mk_learn(class_dls(), Own(), cbs=ManifoldMixUp()).fit(1)
    quiet_fit(mk_learn(class_dls(), Own(), cbs=ManifoldMixUp(layers='enc')))
    learn = mk_learn(class_dls(), Own(), cbs=ManifoldMixUp(layers='spare'))
    with pytest.raises(RuntimeError, match='did not reach its layer spare'): learn.fit(1)
    lstm = nn.Sequential(nn.LSTM(6, 5), nn.Identity())
    with pytest.raises(TypeError, match='gives a tuple'): mk_learn(class_dls(), lstm, cbs=ManifoldMixUp(layers='0')).fit(1)

class Bomb(nn.Module):
    live = False
    def forward(self, x):
        if Bomb.live: raise KeyboardInterrupt
        return x

def test_an_interrupted_backward_pass_leaves_nothing_that_mixes():
    def stop(grad): raise KeyboardInterrupt
    class Stop(Callback):
        def before_backward(self): self.learn.loss_grad.register_hook(stop)
    learn = mk_learn(class_dls(), net(), cbs=[ManifoldMixUp(1., layers='1'), Stop()])
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    x = torch.randn(8, 6)
    with torch.no_grad(): got = learn.model.eval()(x)
    assert_close(got, pickle.loads(pickle.dumps(learn.model))(x).detach())
    learn.validate()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())

@pytest.mark.parametrize('for_this_fit', [False,True])
def test_an_interrupted_forward_leaves_nothing_that_mixes(for_this_fit):
    model = nn.Sequential(nn.Linear(6, 9), Bomb(), nn.ReLU(), nn.Linear(9, 4))
    mixer = ManifoldMixUp(1., layers='2')
    learn = mk_learn(class_dls(), model, cbs=None if for_this_fit else mixer)
    Bomb.live = True
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[mixer]*for_this_fit)
    Bomb.live = False
    x = torch.randn(8, 6)
    assert model(x).equal(model(x)) and model(x).equal(nn.Sequential(*model)(x))
    pickle.dumps(learn.__getstate__()['model'])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    learn.validate()
    quiet_fit(learn, 1)

def test_alpha_zero_and_validation():
    torch.manual_seed(0)
    a = net()
    torch.manual_seed(0)
    b = net()
    quiet_fit(mk_learn(class_dls(), a, cbs=ManifoldMixUp(0)), 2)
    quiet_fit(mk_learn(class_dls(), b), 2)
    for p,q in zip(a.parameters(), b.parameters()): assert_close(p, q)

def test_set_seed_repeats():
    runs = []
    for _ in range(2):
        learn = mk_learn(class_dls(), net(), cbs=[ManifoldMixUp(1.), see := See()])
        set_seed(4)
        quiet_fit(learn, 3)
        runs.append(see.layers)
    assert runs[0]==runs[1] and len(set(runs[0]))==3

def test_one_of_mixes_inputs():
    with pytest.raises(ValueError, match='mixers of inputs'): OneOf(ManifoldMixUp(), None)

class Again(Callback):
    "Calls the model again between its prediction and the backward pass: with the batch, and with something else"
    run_valid = False
    def after_loss(self):
        x = torch.ones_like(self.x)
        with torch.no_grad(): self.got,self.want,self.other,self.plain = self.model(*self.xb),self.pred,self.model(x),self.learn.by_hand(x)

def test_another_call_before_the_backward_pass():
    "With the batch it is mixed as before, with anything else it is not"
    torch.manual_seed(0)
    a,b = nn.Linear(6, 8),nn.Linear(8, 4)
    learn = mk_learn(class_dls(), nn.Sequential(a, nn.ReLU(), b), cbs=[ManifoldMixUp(1., layers='0'), again := Again()])
    learn.by_hand = lambda x: nn.functional.linear(nn.functional.linear(x, a.weight, a.bias).relu(), b.weight, b.bias)
    quiet_fit(learn)
    assert_close(again.got, again.want.detach())
    assert_close(again.other, again.plain)

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
    for b in record.batches:
        (x,),plan = b['xb'],b['plan']
        h = model.layer(model.words(x))
        h = torch.stack([w*h[i]+(1-w)*h[j] for i,(w,j) in enumerate(zip(plan.lam, plan.idx))])
        assert_close(b['pred'], model.pool(h, x))

def test_no_hook_is_left_where_targets_were_changed():
    class Changes(Callback):
        order,run_valid = 5,False
        def before_batch(self): self.learn.yb = tuple((o+1)%4 for o in self.yb)
    learn = mk_learn(class_dls(), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), cbs=[ManifoldMixUp(1., layers='0'), Changes()])
    with pytest.raises(RuntimeError, match='has changed the targets'): quiet_fit(learn)
    pickle.dumps(learn.model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())

@pytest.mark.parametrize('event', ['after_loss','after_step','after_batch'])
def test_predictions_in_the_middle_of_a_batch_are_not_mixed(event):
    "Nor are those of a part of the model"
    class Predicts(Callback):
        run_valid = False
    def predict(self):
        x = torch.stack([o[0] for o in self.dls.valid_ds])
        with torch.no_grad(): want = nn.Sequential(*pickle.loads(pickle.dumps(self.learn.model))).eval()(x)
        got = self.learn.get_preds(inner=True)[0]
        assert_close(got, want)
        self.learn.model[:3](x[:5])
        raise CancelFitException
    setattr(Predicts, event, predict)
    learn = mk_learn(class_dls(), net(), cbs=[Predicts(), ManifoldMixUp(1., layers='1')])
    with learn.no_bar(): quiet_fit(learn)

@pytest.mark.parametrize('batch_first', [True,False])
def test_times_in_front_are_not_taken_for_samples(batch_first):
    "With as many times as samples nothing else would tell"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.t,self.out = nn.TransformerEncoderLayer(4, 1, 8, batch_first=batch_first),nn.Linear(4, 4)
        def forward(self, x): return self.out(self.t(x if batch_first else x.transpose(0, 1)).mean(1 if batch_first else 0))
    learn = mk_learn(mk_dls([torch.randn(32, 8, 4)], [torch.arange(32)%4]), Net(), cbs=ManifoldMixUp(layers='t'))
    if batch_first: return quiet_fit(learn)
    with pytest.raises(TypeError, match='is not batch_first'): quiet_fit(learn)

def test_channels_are_not_taken_for_times():
    "Attention within a layer says nothing of what the layer gives"
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.MultiheadAttention(8, 1)
        def forward(self, x):
            h = x.flatten(2).permute(2, 0, 1)
            return self.a(h, h, h)[0].permute(1, 2, 0).view(x.shape)
    model = nn.Sequential(Attends(), nn.Flatten(), nn.Linear(8*4, 4))
    quiet_fit(mk_learn(mk_dls([torch.randn(32, 8, 2, 2)], [torch.arange(32)%4]), model, cbs=ManifoldMixUp(layers='0')))
