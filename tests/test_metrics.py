"Metrics of mixed training batches, the clean loss, and calibration, each against a reference of its own"
import re
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp as FastaiMixUp
from fastai.callback.rnn import RNNCallback
from fastai.data.block import CategoryBlock
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.losses import BaseLoss
from fastai.metrics import AvgMetric, F1Score, F1ScoreMulti, accuracy, accuracy_multi, error_rate, foreground_acc, mse, rmse
from fastai.tabular.all import Categorify, TabularDataLoaders, tabular_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config
from fastai.text.models.core import get_text_classifier
from matplotlib import pyplot as plt
from sklearn.metrics import f1_score
from torch import nn
from torch.testing import assert_close
from torchmetrics import CalibrationError as TorchCalibration
from fastmix.batch import MixedBatch
from fastmix.losses import ClassBCELoss, MixLoss, MultiLoss
from fastmix.metrics import CalibrationError, CleanLoss, MixMetric, calibration_bins
from fastmix.mixers import CutMix, MixUp, OneOf
from fastmix.partners import SecondLoader
from fastmix.plan import Plan
from helpers import class_dls, mk_dls, mk_learn, name_of, quiet_fit, Record

def train(dls, metrics, mixer, model=None, loss_func=None, n_epoch=1, cbs=(), lr=0.):
    learn = mk_learn(dls, model, loss_func, metrics=metrics, cbs=[*([mixer] if mixer else []), record := Record(), *cbs])
    learn.recorder.train_metrics = True
    quiet_fit(learn, n_epoch, lr=lr)
    names = list(learn.recorder.metric_names[1:-1])
    return dict(zip(names, learn.recorder.values[-1])),record.batches,learn

def each_target(b):
    "(sample, weight, class) for each target of each sample, one by one"
    plan = b['plan']
    for i,(ws,js) in enumerate(zip(plan.weights.expand(plan.pairs.shape), plan.pairs)):
        for w,j in zip(ws.tolist(), js.tolist()): yield i,w,b['yb'][0][j]

def mean_accuracy(batches, n, head=lambda pred: pred):
    return pytest.approx(sum(w*(head(b['pred'])[i].argmax()==y).item() for b in batches for i,w,y in each_target(b))/n, abs=1e-5)

mixers = [MixUp(1., k=3), MixUp(1., per_batch=True), MixUp(1., p=.5), OneOf(MixUp(1.), MixUp(1., k=4), None), OneOf(MixUp(1.), None, per_batch=False), MixUp(0)]

@pytest.mark.parametrize('mixer', mixers, ids=name_of)
def test_mean_over_samples(mixer):
    "Accuracy of each target of each sample, counted by its weight; of the validation set, accuracy"
    got,batches,learn = train(class_dls(n=60, drop_last=False), [MixMetric(accuracy)], mixer)
    assert got['train_mix_accuracy']==mean_accuracy(batches, 60)
    preds,targs = learn.get_preds()
    assert got['valid_mix_accuracy']==pytest.approx(accuracy(preds, targs).item())==learn.validate()[1]

def item_accuracy(pred, y): return (pred.argmax(1)==y).float().mean().item()
def half_accuracy(pred, y): return (pred.argmax(1)==y).bfloat16().mean()

@pytest.mark.parametrize('metric', [item_accuracy, half_accuracy], ids=name_of)
def test_metrics_that_read_numbers_or_round(metric):
    got,batches,_ = train(class_dls(n=60, drop_last=False), [MixMetric(metric)], MixUp(1.))
    assert got[f'train_mix_{metric.__name__}']==mean_accuracy(batches, 60)

def test_several_means_in_one_metric():
    y,plan = torch.arange(8)%4,Plan.of(torch.arange(8).roll(1), torch.linspace(.5, 1., 8))
    pred,mixer = torch.randn(8, 4),MixUp(1.)
    mixer.record = MixedBatch((), (y,), (), (y,), plan, plan, None, MixLoss(nn.CrossEntropyLoss(), plan, (y,)))
    metric = MixMetric(lambda p,y: torch.stack([accuracy(p, y), error_rate(p, y)]))
    metric.reset()
    metric.accumulate(SimpleNamespace(training=True, cbs=[mixer], pred=pred, yb=(y,)))
    want = mean_accuracy([dict(plan=plan, pred=pred, yb=(y,))], 8)
    assert metric.value[0]==want and 1-metric.value[1]==want

def test_without_a_mixer_it_is_the_metric_itself():
    got,_,_ = train(class_dls(n=64, drop_last=False), [MixMetric(accuracy)], None)
    assert got['train_mix_accuracy']==got['valid_mix_accuracy']
    metric = MixMetric(accuracy)
    metric.reset()
    assert metric.value is None and metric.name=='mix_accuracy'

def test_validation_after_a_batch_that_did_not_end():
    "A preview, or Ctrl-C, leaves a mixed batch behind"
    _,_,learn = train(class_dls(), [MixMetric(accuracy)], MixUp(1.))
    want = learn.validate()[1]
    learn._split(learn.dls.one_batch())
    for event in 'before_train','before_batch': learn(event)
    assert learn.validate()[1]==want

def test_metrics_of_all_samples():
    "F1 of the samples' own targets and of their partners', by the mean of λ"
    got,batches,_ = train(class_dls(n=64), [MixMetric(F1Score(average='macro'))], MixUp(1.), n_epoch=2)
    batches = batches[8:]
    pred = torch.cat([b['pred'].argmax(1) for b in batches])
    lam = torch.cat([b['plan'].lam for b in batches]).mean().item()
    own,other = (f1_score(torch.cat(ys), pred, average='macro') for ys in zip(*((b['yb'][0],b['yb'][0][b['plan'].idx]) for b in batches)))
    assert got['train_mix_f1_score']==pytest.approx(lam*own + (1-lam)*other)

@pytest.mark.parametrize('mixer', [MixUp(1., p=.5),OneOf(MixUp(1.), None, per_batch=False)], ids=name_of)
def test_samples_without_a_partner_count_once(mixer):
    "Nearly every sample is right about its own target, and few about their partner's"
    y = torch.randint(0, 4, (64,))
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad(): model.weight.copy_(20*torch.eye(4))
    got,batches,_ = train(mk_dls([F.one_hot(y, 4).float()], [y]), [MixMetric(F1Score(average='micro')), MixMetric(balanced)], mixer, model)
    rows = [[(b['pred'][i].argmax().item(),t.item(),w) for i,w,t in each_target(b)] for b in batches]
    own,other = ([o for row in rows for o in row[at::2]] for at in (0,1))
    parts = [(own,sum(w for *_,w in own)),([o for o in other if o[2]>0],sum(w for *_,w in other))]
    want = sum(w*np.mean([p==t for p,t,_ in part]) for part,w in parts)/sum(w for _,w in parts)
    assert got['train_mix_f1_score']==pytest.approx(want, abs=1e-5)

def balanced(pred, y):
    "The mean of the accuracies of each class, no mean over samples"
    return torch.stack([(pred.argmax(1)[y==c]==c).float().mean() for c in y.unique()]).mean()

def test_a_metric_that_the_learner_has_too():
    "fastai's `rmse` is one object"
    dls = mk_dls([torch.randn(32, 6)], [torch.randn(32)])
    def score(metrics): return train(dls, metrics, MixUp(1.), nn.Sequential(nn.Linear(6, 1, bias=False), nn.Flatten(0)), MSELossFlat())
    for metrics in [MixMetric(rmse)],[rmse,MixMetric(rmse)]:
        got,batches,_ = score(metrics)
        parts = [[(b['pred']-b['yb'][0][j]).square() for b in batches for j in [b['plan'].pairs[:,i]]] for i in (0,1)]
        lam = torch.cat([b['plan'].lam for b in batches]).mean()
        want = lam*torch.cat(parts[0]).mean().sqrt() + (1-lam)*torch.cat(parts[1]).mean().sqrt()
        assert got['train_mix__rmse']==pytest.approx(want.item(), rel=1e-4)

@pytest.mark.parametrize('metric,loss_func,y', [(mse, MSELossFlat(), torch.rand(32, 1)), (accuracy_multi, BCEWithLogitsLossFlat(), (torch.rand(32, 1)>.5).float())], ids=['numbers','labels'])
def test_targets_that_the_loss_blends_are_not_blended_for_metrics(metric, loss_func, y):
    got,batches,_ = train(mk_dls([torch.randn(32, 6)], [y]), [MixMetric(metric)], MixUp(1.), nn.Linear(6, 1), loss_func)
    def score(p, y): return metric(p[None], y[None]).item()
    want = [sum(w*score(b['pred'][i], y) for i,w,y in each_target(b))/8 for b in batches]
    assert got[f'train_mix_{metric.__name__}']==pytest.approx(np.mean(want), abs=1e-6)

def test_metrics_of_several_labels():
    "Of all samples: once for their own labels, once for those of their partners"
    y = (torch.rand(32, 3)>.5).float()
    got,batches,_ = train(mk_dls([torch.randn(32, 6)], [y]), [MixMetric(F1ScoreMulti())], MixUp(1.), nn.Linear(6, 3), BCEWithLogitsLossFlat())
    pred,lam = torch.cat([b['pred'] for b in batches])>0,torch.cat([b['plan'].lam for b in batches]).mean().item()
    own,partners = torch.cat([b['yb'][0] for b in batches]),torch.cat([b['yb'][0][b['plan'].idx] for b in batches])
    def f1(y):
        tp = (pred*y).sum(0)
        return (2*tp/(pred.sum(0)+y.sum(0))).mean().item()
    assert got['train_mix_f1_score']==pytest.approx(lam*f1(own)+(1-lam)*f1(partners), abs=1e-6)

def test_masks_that_are_cut_need_no_weights():
    x,y = torch.rand(16, 3, 6, 6),torch.randint(0, 3, (16,6,6))
    for mixer in CutMix(),MixUp(1.):
        got,batches,_ = train(mk_dls([x], [y]), [MixMetric(foreground_acc)], mixer, nn.Conv2d(3, 3, 1), CrossEntropyLossFlat(axis=1))
        if isinstance(mixer, MixUp):   # a mean over the pixels of the batch, and not over its images
            want = [sum(w.mean().item()*foreground_acc(b['pred'], b['yb'][0][j]).item() for w,j in zip(b['plan'].sample_weights.T, b['plan'].pairs.T)) for b in batches]
        else: want = [foreground_acc(b['pred'], torch.where(b['plan'].region.mask, b['yb'][0][b['plan'].idx], b['yb'][0])).item() for b in batches]
        assert got['train_mix_foreground_acc']==pytest.approx(np.mean(want), abs=1e-5)

def test_targets_of_a_second_loader():
    dl = torch.utils.data.DataLoader(list(zip(torch.randn(8, 6), torch.arange(8)%4)), batch_size=8)
    got,batches,_ = train(class_dls(), [MixMetric(accuracy)], MixUp(1., partners=SecondLoader(dl)))
    for b in batches: b['yb'] = torch.cat([b['yb'][0], torch.arange(8)%4]),
    assert got['train_mix_accuracy']==mean_accuracy(batches, 32)

class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b = nn.Linear(6, 4),nn.Linear(6, 1)
    def forward(self, x): return self.a(x),self.b(x)

def kind_accuracy(preds, kind, age): return accuracy(preds[0], kind)

def test_several_targets():
    x,kind,age = torch.randn(32, 6),torch.randint(0, 4, (32,)),torch.rand(32, 1)
    loss = MultiLoss(nn.CrossEntropyLoss(), MSELossFlat(), weights=[1,2.])
    got,batches,learn = train(mk_dls([x], [kind,age]), [MixMetric(kind_accuracy)], MixUp(1.), TwoHeads(), loss)
    assert got['train_mix_kind_accuracy']==mean_accuracy(batches, 32, lambda preds: preds[0])
    preds,targs = learn.get_preds()
    assert preds[0].shape==(32,4) and targs[1].shape==(32,1)

# The clean loss

def test_clean_loss_is_that_of_the_batch_as_it_came():
    "Without mixing, without dropout, and it changes nothing: neither running means nor random numbers"
    def model(): return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(.5), nn.Linear(9, 4))
    torch.manual_seed(0)
    seen = []
    class Look(Callback):
        order,run_valid = 49,False
        def after_batch(self):
            state = [m.training for m in self.model.modules()]
            self.model.eval()
            b = self.record.batches[-1]
            with torch.no_grad(): seen.append(F.cross_entropy(self.model(b['xb'][0]), b['yb'][0]).item())
            for m,o in zip(self.model.modules(), state): m.training = o
    got,_,a = train(class_dls(), [CleanLoss()], MixUp(1.), model(), lr=.1, cbs=[Look()])
    assert got['train_clean_loss']==pytest.approx(np.mean(seen), rel=1e-5)
    assert got['valid_clean_loss']==pytest.approx(got['valid_loss'], rel=1e-5)
    torch.manual_seed(0)
    _,_,b = train(class_dls(), [], MixUp(1.), model(), lr=.1)
    for p,q in zip(a.model.state_dict().values(), b.model.state_dict().values()): assert p.equal(q)

def test_frozen_layers_stay_as_they_are():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    class Freeze(Callback):
        order,run_valid = 60,False
        def before_batch(self): self.model[1].eval()
        def after_batch(self): assert self.model.training and not self.model[1].training and self.training and type(self.loss_func) is nn.CrossEntropyLoss
    train(class_dls(), [CleanLoss()], MixUp(1.), model, cbs=[Freeze()])

def test_clean_loss_of_texts():
    "A model whose predictions a callback unpacks, and which looks its input up"
    config = awd_lstm_clas_config | dict(emb_sz=10, n_hid=12, n_layers=1)
    model = get_text_classifier(AWD_LSTM, 50, 4, config=config)
    model[1].layers = nn.Linear(30, 4)
    tokens,y = torch.randint(2, 50, (32,9)),torch.randint(0, 4, (32,))
    got,_,learn = train(mk_dls([tokens], [y]), [CleanLoss()], MixUp(1.), model, cbs=[RNNCallback()])
    learn.model.eval()
    assert got['train_clean_loss']==pytest.approx(F.cross_entropy(learn.model(tokens)[0], y).item(), rel=1e-4)

class Stateful(nn.Module):
    "Carries its hidden state from batch to batch, and counts its calls"
    def __init__(self):
        super().__init__()
        self.rnn,self.out,self.hidden,self.n = nn.LSTM(3, 8, batch_first=True),nn.Linear(8, 4),None,[0]
        self.register_buffer('seen', torch.zeros(()))
    def forward(self, x):
        res,hidden = self.rnn(x, self.hidden)
        self.hidden = tuple(o.detach() for o in hidden)
        self.n[0] += 1
        self.seen += x.mean().detach()
        return self.out(res[:,-1])

def test_clean_loss_leaves_the_state_of_a_model():
    def run(metrics):
        torch.manual_seed(3)
        _,_,learn = train(mk_dls([torch.randn(32, 5, 3)], [torch.randint(4, (32,))]), metrics, MixUp(1.), Stateful(), lr=.1)
        return learn.model
    a,b = run([]),run([CleanLoss()])
    assert a.n==b.n and a.seen.equal(b.seen) and all(p.equal(q) for p,q in zip(a.parameters(), b.parameters()))

def test_clean_loss_without_a_mixer():
    got,_,_ = train(class_dls(), [CleanLoss()], None)
    assert got['train_clean_loss']==pytest.approx(got['valid_loss'], rel=1e-5)

# Calibration

def overconfident(n=4000, c=5, t=3.):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(n, c, generator=g)
    return logits*t,torch.multinomial(logits.softmax(1), 1, generator=g)[:,0]

def identity():
    "A model that predicts its input"
    model = nn.Linear(5, 5, bias=False)
    nn.init.eye_(model.weight)
    return model

losses = [nn.CrossEntropyLoss(), CrossEntropyLossFlat(), ClassBCELoss()]

@pytest.mark.parametrize('loss_func,n_bins,norm', zip(losses, (15,7,10), ('l1','l2','max')), ids=['l1','l2','max'])
def test_calibration_error(loss_func, n_bins, norm):
    "On all of the validation set, by the probabilities that the loss stands for"
    logits,targs = overconfident(400)
    learn = mk_learn(mk_dls([logits], [targs], bs=64), identity(), loss_func, metrics=CalibrationError(n_bins, norm))
    probs = logits.sigmoid() if isinstance(loss_func, ClassBCELoss) else logits.softmax(1)
    want = TorchCalibration(task='multiclass', num_classes=5, n_bins=n_bins, norm=norm)(probs, targs)
    with learn.no_logging(): assert learn.validate()[1]==pytest.approx(want.item(), abs=1e-5)

def test_calibration_bins():
    "Against a loop over the samples"
    logits,targs = overconfident()
    probs = logits.softmax(1)
    conf,acc,fraction = calibration_bins(probs, targs, 10)
    for i in range(10):
        rows = [r for r in range(len(probs)) if i/10 <= probs[r].max().item() < (i+1)/10]
        assert fraction[i]==pytest.approx(len(rows)/len(probs), abs=1e-3)
        if rows: assert acc[i]==pytest.approx(np.mean([probs[r].argmax().item()==targs[r].item() for r in rows]), abs=.01)
    assert calibration_bins(torch.tensor([[1.,0.],[1.,0.]]), torch.tensor([0,1]), 4)[1][3]==.5
    assert fraction.sum()==pytest.approx(1) and conf[0].isnan()==(fraction[0]==0)

@pytest.mark.parametrize('loss_func', losses, ids=name_of)
def test_plot_calibration(loss_func):
    logits,targs = overconfident(400)
    learn = mk_learn(mk_dls([logits], [targs], bs=64), identity(), loss_func)
    ax = learn.plot_calibration(n_bins=10)
    probs = logits.sigmoid() if isinstance(loss_func, ClassBCELoss) else logits.softmax(1)
    want = 100*TorchCalibration(task='multiclass', num_classes=5, n_bins=10)(probs, targs).item()
    assert f'{want:.1f} %' in ax.get_title()
    assert_close(torch.tensor(ax.lines[1].get_ydata()), calibration_bins(probs, targs, 10)[1], equal_nan=True)
    plt.close('all')

def test_calibration_of_a_table():
    "Whose targets have the shape (n, 1), int8"
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=rng.normal(size=200), b=rng.choice(['x','y'], 200), kind=rng.choice(['u','v'], 200)))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify], cat_names=['b'], cont_names=['a'], y_names='kind', y_block=CategoryBlock(), bs=32)
    learn = quiet_fit(tabular_learner(dls, [8], metrics=[CalibrationError()], cbs=MixUp(1.)))
    with learn.no_bar(): probs,targs = learn.get_preds()
    conf,acc,fraction = calibration_bins(probs, targs[:,0])
    want = (fraction*(acc-conf).abs()).nansum().item()
    assert learn.recorder.values[-1][-1]==pytest.approx(want, abs=1e-5)
    assert learn.plot_calibration().get_title()==f'calibration error {100*want:.1f} %'
    plt.close('all')

@pytest.mark.parametrize('y', [torch.rand(32, 1), torch.rand(32, 4).round().long()], ids=['numbers','labels'])
def test_calibration_needs_classes(y):
    learn = mk_learn(mk_dls([torch.randn(32, 6)], [y]), loss_func=lambda p, y: p.square().mean(), metrics=[CalibrationError()])
    with pytest.raises(ValueError, match='one class for each sample'): quiet_fit(learn)
    with learn.no_bar(), pytest.raises(ValueError, match='one class for each sample'): learn.plot_calibration()

# What the loss ignores
class Same(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))
    def forward(self, x): return self.w*x

@pytest.mark.parametrize('shape', [(40,), (6,5,4)], ids=['classes','masks'])
def test_ignored_targets_are_no_errors(shape):
    y,loss_func = torch.randint(0, 3, shape),CrossEntropyLossFlat(axis=1 if len(shape)>1 else -1, ignore_index=9)
    pred = 3*torch.randn(shape[0], 3, *shape[1:])
    void = torch.rand(shape)<.4
    want = TorchCalibration('multiclass', num_classes=3, n_bins=15)(pred.softmax(1).movedim(1, -1)[~void], y[~void]).item()
    y[void] = 9
    learn = mk_learn(mk_dls([pred], [y], bs=shape[0]//2), Same(), loss_func, metrics=CalibrationError())
    with learn.no_bar(): assert learn.validate()[1]==pytest.approx(want, abs=1e-6)
    ax = learn.plot_calibration()
    assert float(re.search(r'[\d.]+', ax.get_title())[0])==pytest.approx(100*want, abs=.06)

# Functions that are no means over samples
def recall(pred, y):
    hits = (pred.argmax(1)==1)&(y==1)
    return hits.sum()/(y==1).sum()

def positives(pred, y): return (y==1).sum()

@pytest.mark.parametrize('metric', [recall, positives], ids=name_of)
def test_a_function_of_the_whole_batch(metric):
    "Is weighted by the mean of λ, as a metric of all samples is"
    got,batches,_ = train(class_dls(n=64, bs=32), [MixMetric(metric)], MixUp(1.))
    want = [sum(w.mean()*metric(b['pred'], b['yb'][0][j]) for w,j in zip(b['plan'].sample_weights.T, b['plan'].pairs.T)).item() for b in batches]
    assert got[f'train_mix_{metric.__name__}']==pytest.approx(np.mean(want), abs=1e-5)

class Copies(Callback):
    order,run_valid = 20,False
    def after_loss(self): self.learn.yb = tuple(y.clone() for y in self.yb)

@pytest.mark.parametrize('metric', [MixMetric(accuracy), CleanLoss()], ids=['accuracy','clean loss'])
def test_targets_that_are_replaced_after_the_loss(metric):
    with pytest.raises(RuntimeError, match='replaced the targets'): train(class_dls(), [metric], MixUp(1.), cbs=[Copies()])

def test_calibration_takes_the_axis_of_the_loss():
    pred,y = 3*torch.randn(8, 5, 5),torch.randint(0, 5, (8,5))
    learn = mk_learn(mk_dls([pred], [y]), Same(), CrossEntropyLossFlat(axis=-1), metrics=CalibrationError())
    want = TorchCalibration('multiclass', num_classes=5, n_bins=15)(pred.softmax(-1).flatten(0, 1), y.flatten()).item()
    with learn.no_bar(): assert learn.validate()[1]==pytest.approx(want, abs=1e-6)

def test_targets_that_are_no_class():
    def f(pred, y): return F.cross_entropy(pred, y, ignore_index=255)
    learn = mk_learn(mk_dls([torch.randn(8, 2)], [torch.tensor([0,1,255,0,1,1,255,0])]), Same(), f, metrics=CalibrationError())
    with pytest.raises(ValueError, match='classes from 0 to 1, but there are targets from 0 to 255.*ignore_index'), learn.no_bar(): learn.validate()

def test_a_mixer_of_fastai_is_named():
    "It mixes in an unknown way"
    with pytest.raises(ValueError, match='has MixUp of fastai.callback.mixup, which is no mixer of fastmix'):
        train(class_dls(), [MixMetric(accuracy)], FastaiMixUp(), loss_func=CrossEntropyLossFlat())

def test_the_clean_loss_leaves_the_memory_of_a_loss_alone():
    class Counts(nn.Module):
        n = 0
        def forward(self, p, y):
            self.n += 1
            return F.cross_entropy(p, y)/self.n
    f = Counts()
    train(class_dls(), [CleanLoss()], MixUp(1.), loss_func=f)
    assert f.n==8   # four batches of training, and four of validation

def test_a_metric_that_fails_on_single_samples():
    def precision(p, y): return ((p.argmax(1)==1)&(y==1)).sum().item()/(p.argmax(1)==1).sum().item()
    got,batches,_ = train(class_dls(n=64, bs=32), [MixMetric(precision)], MixUp(1.))
    want = [sum(w.mean().item()*precision(b['pred'], b['yb'][0][j]) for w,j in zip(b['plan'].sample_weights.T, b['plan'].pairs.T)) for b in batches]
    assert got['train_mix_precision']==pytest.approx(np.mean(want), abs=1e-5)

def test_predictions_that_hold_a_number_of_the_batch():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 4)
        def forward(self, x): return (o := self.lin(x)),o.square().mean()
    def first_accuracy(p, y): return accuracy(p[0], y)
    def loss_func(p, y, reduction='mean'): return F.cross_entropy(p[0], y, reduction=reduction) + .1*p[1]
    got,batches,_ = train(class_dls(), [MixMetric(first_accuracy)], MixUp(1., per_batch=True), Two(), loss_func)
    assert got['train_mix_first_accuracy']==mean_accuracy(batches, 32, lambda pred: pred[0])

class Merges(nn.Linear):
    "Does something when it is set to evaluate"
    merged = False
    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)

def test_the_clean_loss_sets_modes_only():
    model = Merges(6, 4)
    class Look(Callback):
        run_valid = False
        def before_batch(self): assert not model.merged
        def after_batch(self): assert not model.merged
    train(class_dls(), [CleanLoss()], MixUp(1.), model, cbs=[Look()])

class OfTwoClasses(AvgMetric):
    "What it accumulates is its own"
    def accumulate(self, learn):
        keep = learn.y<2
        self.total += self.func(learn.pred[keep], learn.y[keep])*keep.sum()
        self.count += keep.sum()

def test_a_metric_with_an_accumulate_of_its_own():
    found,batches,_ = train(class_dls(), MixMetric(OfTwoClasses(accuracy)), MixUp(1., per_batch=True))
    right,all_ = 0,0
    for i in range(2):   # the samples, then their partners, each by the mean of its weight
        of_part = [(p.argmax()==y).item() for b in batches for p,y in zip(b['pred'], b['yb'][0][b['plan'].pairs[:,i]]) if y<2]
        weight = sum(b['plan'].sample_weights[:,i].sum().item() for b in batches)
        right,all_ = right+weight*np.mean(of_part),all_+weight
    assert found['train_mix_accuracy']==pytest.approx(right/all_, abs=1e-4)

def test_a_metric_of_mixed_batches_is_not_mixed_again():
    with pytest.raises(TypeError, match='as it is'): MixMetric(MixMetric(accuracy))

def test_the_clean_loss_of_inputs_that_are_changed_after_mixing():
    class Centre(Callback):
        def __init__(self, order): self.order = order
        def before_batch(self): self.learn.xb = self.x-.5,
    train(class_dls(), CleanLoss(), MixUp(1.), cbs=[Centre(-1)])
    with pytest.raises(RuntimeError, match='`order` below 9.5'): train(class_dls(), CleanLoss(), MixUp(1.), cbs=[Centre(11)])

def nll_of_probs(p, y): return F.nll_loss(p.clamp_min(1e-6).log(), y)

last_layers = [(BaseLoss(nn.CrossEntropyLoss, axis=-1),nn.Identity()), (nll_of_probs,nn.Softmax(1)), (BaseLoss(nn.NLLLoss, axis=-1),nn.LogSoftmax(1))]

@pytest.mark.parametrize('loss_func,last', last_layers, ids=['no activation','probabilities','their logarithm'])
def test_calibration_makes_probabilities_once(loss_func, last):
    "Of logits in 0..1, which could be taken for probabilities"
    torch.manual_seed(1)
    body = nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.Sigmoid())
    learn = mk_learn(class_dls(), nn.Sequential(body, last), loss_func, metrics=CalibrationError())
    with learn.no_bar(),learn.no_logging():
        logits,targs = learn.get_preds(act=lambda o: o)
        probs = logits if isinstance(last, nn.Softmax) else logits.softmax(1)
        want = TorchCalibration('multiclass', num_classes=4)(probs, targs).item()
        assert learn.validate()[1]==pytest.approx(want, abs=1e-5)
        assert learn.plot_calibration().get_title()==f'calibration error {100*want:.1f} %'
    plt.close()
