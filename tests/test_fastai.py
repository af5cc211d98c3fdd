"fastmix in the company of fastai: every kind of data block, callback, loss and way of training, with each batch's loss computed anew"
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from fastai import losses
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.rnn import RNNRegularizer
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.data.block import CategoryBlock, DataBlock, MultiCategoryBlock, RegressionBlock
from fastai.data.transforms import IndexSplitter
from fastai.interpret import ClassificationInterpretation, Interpretation
from fastai.learner import Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, MSELossFlat
from fastai.metrics import accuracy
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.data import TextDataLoaders
from fastai.text.learner import text_classifier_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config
from fastai.torch_core import set_seed
from fastai.vision.augment import aug_transforms
from fastai.vision.data import BBoxBlock, BBoxLblBlock, ImageBlock, MaskBlock, PointBlock
from fastai.vision.learner import unet_learner, vision_learner
from fastai.vision.models.xresnet import xresnet18
from torchvision.models import resnet18
from torch import nn
from fastmix.handler import MixHandler
from fastmix.losses import MultiLoss
from fastmix.manifold import ManifoldMixUp
from fastmix.mixers import CutMix, CutMixUp, FMix, GridMix, MixUp, OneOf, ResizeMix, SaliencyMix
from fastmix.partners import other_class
from fastmix.show import *
from helpers import mk_dls, mk_learn, name_of, quiet_fit

g = np.random.default_rng(0)
images = g.integers(0, 256, (24,16,16,3), dtype=np.uint8)
def image(i): return images[i]
def kind(i): return 'abc'[i%3]

class Check(Callback):
    "Compares the mixed inputs of each training batch, and its loss, with what the plan says, sample by sample"
    order,run_valid = -1,False
    def __init__(self, loss=None, inputs=True): self.want,self.inputs,self.n = loss,inputs,0
    def before_batch(self): self.came = self.learn.xb,self.learn.yb
    def after_loss(self):
        self.n += 1
        mixer = mixer_of(self.learn)
        plan = mixer.record.plan
        (xb,yb),weights = self.came,plan.weights.expand(plan.pairs.shape)
        def blended(f): return torch.stack([sum(w*f(int(j)) for w,j in zip(ws, js)) for ws,js in zip(weights, plan.pairs)])
        def mixed(o):
            "An image, a mask or a map: cut where something is cut, blended elsewhere"
            if plan.region is None: return blended(lambda j: o[j].float())
            if isinstance(mixer, ResizeMix): return plan.mix(o).float()   # its own test has the reference
            return torch.stack([torch.where(plan.region.mask.expand(len(o), *plan.region.size)[i], o[j], o[i]) for i,j in enumerate(plan.pairs[:,1])]).float()
        if self.inputs:
            for x,got in zip(xb, self.learn.xb): torch.testing.assert_close(plain(got).float(), plain(mixed(plain(x))), rtol=1e-4, atol=1e-4)
        if self.want: assert self.loss_grad.item()==pytest.approx(self.want(self.learn.pred, yb, blended, mixed).item(), rel=2e-3)

def mixer_of(learn): return next(cb for cb in learn.cbs if isinstance(cb, MixHandler))
def plain(o): return o.as_subclass(torch.Tensor)
def class_loss(pred, yb, blended, mixed):
    return F.cross_entropy(pred.detach().float(), blended(lambda j: F.one_hot(plain(yb[0]).view(-1)[j].long(), pred.shape[1]).float()))

def image_dls(*blocks, n=24, bs=4, **kwargs):
    "Loaders of small images, of which the last quarter is there to validate on"
    set_seed(0)
    block = DataBlock((ImageBlock,*blocks), get_x=image, splitter=IndexSplitter(range(n*3//4, n)), **kwargs)
    return block.dataloaders(range(n), bs=bs, num_workers=0, device='cpu')

def kind_dls(**kwargs): return image_dls(CategoryBlock, get_y=kind, **kwargs)
def net(n_out=3):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.1), nn.Linear(8, n_out))

def run(learn, n_epoch=1, **kwargs):
    quiet_fit(learn, n_epoch, **kwargs)
    assert learn.check.n
    return learn

# Ways of training

def fp16(): return MixedPrecision(amp_mode=AMPMode.FP16)
ways = dict(accumulate=lambda: GradientAccumulation(8), clip=lambda: GradientClip(.1), save=lambda: SaveModelCallback(), stop=lambda: EarlyStoppingCallback(),
    freeze_bn=BnFreeze, channels_last=ChannelsLast, bf16=lambda: MixedPrecision(amp_mode=AMPMode.BF16), fp16=fp16)

@pytest.mark.filterwarnings('ignore')   # scaling gradients is switched off on a CPU, with a warning
@pytest.mark.parametrize('mixer', [MixUp(1.), OneOf(MixUp(1.), CutMix(), None, per_batch=False)], ids=name_of)
@pytest.mark.parametrize('way', ways)
def test_callbacks(way, mixer, tmp_path):
    inputs = type(mixer) is not OneOf
    learn = Learner(kind_dls(), net(), metrics=accuracy, path=tmp_path, cbs=[mixer, Check(class_loss, inputs), ways[way]()])
    own = learn.loss_func
    run(learn, 2)
    assert learn.loss_func is own
    learn.validate()

@pytest.mark.parametrize('arch', ['resnet18d', 'mobilenetv3_small_050', resnet18, xresnet18], ids=lambda o: getattr(o, '__name__', o))
def test_vision_learner(arch):
    "timm's models and torchvision's, frozen and not, with discriminative learning rates"
    learn = vision_learner(kind_dls(), arch, pretrained=False, normalize=False, metrics=accuracy, cbs=[MixUp(.4), Check(class_loss)])
    with learn.no_logging(),learn.no_bar(): learn.fine_tune(1)
    run(learn, lr=slice(1e-5, 1e-3))
    with learn.no_bar():
        assert learn.tta()[0].shape==(6,3)
        assert learn.predict(images[0])[2].sum()==pytest.approx(1, abs=1e-5)

def test_looking_back():
    "Interpretation, predictions with losses, and augmentation"
    learn = run(Learner(kind_dls(batch_tfms=aug_transforms(size=16)), net(), metrics=accuracy, cbs=[CutMixUp(), Check(inputs=False)]))
    with learn.no_bar():
        preds,targs,loss = learn.get_preds(with_loss=True)
        assert loss.shape==(6,) and loss.mean()==pytest.approx(F.nll_loss(preds.log(), plain(targs)).item(), rel=1e-4)
        interp = ClassificationInterpretation.from_learner(learn)
        assert interp.confusion_matrix().sum()==6
        assert len(Interpretation.from_learner(learn).top_losses(3)[0])==3
        assert learn.tta(n=2)[0].shape==(6,3)

# Targets

def numbers(i): return float(i)
def several(i): return ['abc'[i%3]]+['d']*(i%2)
def levels(i): return [float(i%4>k) for k in range(3)]

def number_loss(pred, yb, blended, mixed): return F.mse_loss(pred.detach().flatten(), blended(lambda j: plain(yb[0])[j].view(-1)).flatten())
def labels_loss(pred, yb, blended, mixed): return F.binary_cross_entropy_with_logits(pred.detach(), blended(lambda j: plain(yb[0])[j]))

targets = dict(number=(RegressionBlock, numbers, 1, number_loss), labels=(MultiCategoryBlock, several, 4, labels_loss),
    ordinal=(RegressionBlock(3), levels, 3, labels_loss), category=(CategoryBlock, kind, 3, class_loss))

@pytest.mark.parametrize('mixer', [MixUp(1., k=3), SaliencyMix()], ids=name_of)
@pytest.mark.parametrize('name', targets)
def test_targets(name, mixer):
    block,get_y,n_out,loss = targets[name]
    loss_func = BCEWithLogitsLossFlat() if name=='ordinal' else None
    run(Learner(image_dls(block, get_y=get_y), net(n_out), loss_func, cbs=[mixer, Check(loss)]))

def points(i): return [[i%16,3.],[5.,i%7]]

@pytest.mark.parametrize('mixer', [MixUp(1.), MixUp(1., k=3)], ids=name_of)
def test_points_are_blended(mixer):
    run(Learner(image_dls(PointBlock, get_y=points), net(4), MSELossFlat(), cbs=[mixer, Check(number_loss)]))

@pytest.mark.parametrize('mixer', [CutMix(), FMix(), ResizeMix(), OneOf(CutMix(), CutMix())], ids=name_of)
def test_points_are_not_cut(mixer):
    learn = Learner(image_dls(PointBlock, get_y=points), net(4), MSELossFlat(), cbs=mixer)
    own,state = learn.loss_func,{k:v.clone() for k,v in learn.model.state_dict().items()}
    with pytest.raises(ValueError, match=r'shape \(4, 2, 2\).*blend the batch \(`MixUp`\)'): learn.fit(1)
    assert learn.loss_func is own and all(v.equal(state[k]) for k,v in learn.model.state_dict().items())

def test_boxes_are_refused():
    dls = image_dls(BBoxBlock, BBoxLblBlock, get_y=[lambda i: [[0,0,5,i%9+1]], lambda i: ['thing']], n_inp=1)
    learn = Learner(dls, net(4), lambda pred, box, label: pred.mean(), cbs=MixUp(1.))
    with pytest.raises(TypeError, match='Bounding boxes cannot be mixed, since .* train without a mixer'): learn.fit(1)

masks = [MixUp(1.), MixUp(1., k=3), CutMix(), ResizeMix(), GridMix(), CutMixUp()]
def mask(i): return (images[i%24,:,:,0]>128).astype(np.uint8)

def mask_loss(pred, yb, blended, mixed):
    y,pred = plain(yb[0]),pred.detach().float()
    weighted = blended(lambda j: F.one_hot(y[j], pred.shape[1]).float()).movedim(-1, 1)
    cut = mixed(y)
    return F.cross_entropy(pred, cut.long() if mask_loss.cut else weighted)

@pytest.mark.parametrize('mixer', masks, ids=name_of)
def test_segmentation(mixer):
    "Masks blended with their images, or cut with them, in a U-Net"
    dls = image_dls(MaskBlock(codes=['off','on']), get_y=mask)
    class CheckMask(Check):
        def after_loss(self):
            mask_loss.cut = mixer_of(self.learn).record.plan.region is not None
            super().after_loss()
        name = 'check'
    run(unet_learner(dls, resnet18, pretrained=False, normalize=False, n_out=2, cbs=[mixer, CheckMask(mask_loss)]), 2)

class Siamese(nn.Module):
    "Predicts whether two images are of the same kind"
    def __init__(self):
        super().__init__()
        self.body,self.head = net(5),nn.Linear(10, 2)
    def forward(self, a, b): return self.head(torch.cat([self.body(a), self.body(b)], 1))

@pytest.mark.parametrize('mixer', [MixUp(1.), CutMix(), ManifoldMixUp(1., layers='body.0')], ids=name_of)
def test_two_images(mixer):
    set_seed(0)
    block = DataBlock((ImageBlock, ImageBlock, CategoryBlock), get_x=[image, lambda i: image(i*7%24)], get_y=lambda i: kind(i)==kind(i*7%24), n_inp=2)
    dls = block.dataloaders(range(24), bs=4, num_workers=0, device='cpu')
    if not isinstance(mixer, ManifoldMixUp):
        run(Learner(dls, Siamese(), cbs=[mixer, Check(class_loss)]))
        dls.show_mix(mixer, max_n=2)
    else:
        with pytest.raises(TypeError, match='body.0 is called more than once'): run(Learner(dls, Siamese(), cbs=[mixer, Check(class_loss, inputs=False)]))

class Both(nn.Module):
    "Predicts what an image shows, and how many"
    def __init__(self):
        super().__init__()
        self.body,self.what,self.many = net(5),nn.Linear(5, 3),nn.Linear(5, 1)
    def forward(self, x): return self.what(h := self.body(x)),self.many(h)

@pytest.mark.parametrize('mixer', [MixUp(1.), MixUp(1., k=3), CutMix()], ids=name_of)
@pytest.mark.parametrize('weight', [None, torch.tensor([1.,2.,5.])], ids=['plain','weighted'])
def test_class_and_number_together(mixer, weight):
    def want(pred, yb, blended, mixed):
        logp,t = pred[0].detach().log_softmax(1),blended(lambda j: F.one_hot(plain(yb[0])[j], 3).float())*(1 if weight is None else weight)
        number = F.mse_loss(pred[1].detach()[:,0], blended(lambda j: plain(yb[1])[j]))
        return -(t*logp).sum()/t.sum() + .1*number
    loss_func = MultiLoss(CrossEntropyLossFlat(weight=weight), MSELossFlat(), weights=[1.,.1])
    dls = image_dls(CategoryBlock, RegressionBlock, get_y=[kind, numbers], n_inp=1)
    learn = run(Learner(dls, Both(), loss_func, cbs=[mixer, Check(want)]))
    with learn.no_bar():
        preds,targs,loss = learn.get_preds(with_loss=True)
        assert preds[0].sum(1).allclose(torch.ones(6)) and loss.shape==(6,)
        what,*_ = learn.predict(images[0])
        assert what[0] in 'abc'

def test_a_loss_for_each_target():
    dls = image_dls(CategoryBlock, RegressionBlock, get_y=[kind, numbers], n_inp=1)
    learn = Learner(dls, Both(), MultiLoss(CrossEntropyLossFlat()), cbs=MixUp(1.))
    with pytest.raises(ValueError, match='1 losses, but there are 2 targets'): learn.fit(1)
    assert type(learn.loss_func) is MultiLoss

# Losses

y1,yf,yd = torch.arange(24)%3,torch.rand(24, 3),torch.arange(24*16).view(24, 4, 4)%3
all_losses = dict(CrossEntropyLossFlat=y1, FocalLossFlat=y1, LabelSmoothingCrossEntropyFlat=y1, LabelSmoothingCrossEntropy=y1, FocalLoss=y1,
    BCEWithLogitsLossFlat=yf, BCELossFlat=yf, MSELossFlat=yf, L1LossFlat=yf, DiceLoss=yd)

def test_that_is_all_of_them(): assert set(all_losses)=={o for o in losses.__all__ if isinstance(getattr(losses, o), type) or o.endswith('Flat')} - {'BaseLoss'}

@pytest.mark.filterwarnings('ignore:.*one λ for each batch')
@pytest.mark.parametrize('mixer', [MixUp(1.), MixUp(1., per_batch=True)], ids=name_of)
@pytest.mark.parametrize('name', all_losses)
def test_every_loss_of_fastai(name, mixer):
    "The mean over samples of the loss on each target, taken alone; of a loss that is no such mean, the losses on both targets"
    y,loss_func = all_losses[name],getattr(losses, name)()
    x = torch.rand(24, 3, 4, 4)
    model = nn.Conv2d(3, 3, 1) if y.ndim==3 else nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    if name=='BCELossFlat': model.append(nn.Sigmoid())
    def want(pred, yb, blended, mixed):
        pred,y = plain(pred.detach()),plain(yb[0])
        if y.is_floating_point(): return loss_func(pred, blended(lambda j: y[j]))
        if name=='DiceLoss': return None
        return blended_rows(learn, lambda i,j: loss_func(pred[i:i+1], y[j:j+1])).mean()
    check = Check(None if name=='DiceLoss' else want)
    learn = mk_learn(mk_dls([x], [y]), model, loss_func, cbs=[mixer, check])
    quiet_fit(learn, 2)
    assert check.n==6

def blended_rows(learn, f):
    plan = mixer_of(learn).record.plan
    return torch.stack([sum(w*f(i, int(j)) for w,j in zip(ws, js)) for i,(ws,js) in enumerate(zip(plan.weights.expand(plan.pairs.shape), plan.pairs))])

# Tables, texts and ratings, from fastai's own loaders and learners

people = pd.DataFrame(dict(job=g.choice(list('xyz'), 64), town=g.choice(5, 64), age=g.normal(size=64), pay=g.normal(size=64), rich=g.choice(['no','yes'], 64)))
people.loc[3:9,'age'] = np.nan

# fastai 2.8.12 cannot make tensors of columns that pandas 3 hands it in the reverse of the table's order: `cont_names` are named in that order here
numbers_in_order = ['age','pay']

@pytest.mark.parametrize('mixer', [MixUp(.4), MixUp(1., partners=other_class), ManifoldMixUp(1.)], ids=name_of)
def test_tabular_learner(mixer, tmp_path):
    set_seed(0)
    dls = TabularDataLoaders.from_df(people, procs=[Categorify,FillMissing,Normalize], cat_names=['job','town'], cont_names=numbers_in_order, y_names='rich', bs=8)
    learn = tabular_learner(dls, [10], metrics=accuracy, cbs=[mixer, Check(class_loss, inputs=False)], path=tmp_path)
    run(learn, 2)
    with learn.no_bar(),learn.no_logging():
        learn.lr_find(show_plot=False)
        assert learn.predict(people.iloc[0])[2].sum()==pytest.approx(1)
    learn.export()
    assert load_learner(tmp_path/'export.pkl').model.embeds[0].num_embeddings==4

def test_tabular_regression():
    set_seed(0)
    dls = TabularDataLoaders.from_df(people, procs=[Categorify,Normalize], cat_names=['job','town'], cont_names=['pay'], y_names='pay', bs=8)
    run(tabular_learner(dls, [10], cbs=[MixUp(.4), Check(number_loss, inputs=False)]))

def test_text_classifier_learner():
    set_seed(0)
    words = 'the cat sat on a mat and the dog ran after it'.split()
    texts = pd.DataFrame(dict(text=[' '.join(g.choice(words, g.integers(2, 40))) for _ in range(48)], label=g.choice(list('ab'), 48)))
    dls = TextDataLoaders.from_df(texts, text_col='text', label_col='label', bs=8, seq_len=10)
    config = awd_lstm_clas_config | dict(emb_sz=10, n_hid=12, n_layers=2)
    check = Check(class_loss, inputs=False)
    learn = text_classifier_learner(dls, AWD_LSTM, seq_len=10, config=config, pretrained=False, metrics=accuracy, cbs=[MixUp(.4), check])
    for cb in learn.cbs.filter(lambda o: isinstance(o, RNNRegularizer)): learn.remove_cb(cb)   # it adds to the loss
    run(learn, 2)
    with learn.no_bar(): assert learn.predict('the cat ran')[2].sum()==pytest.approx(1)

def test_collab_learner():
    set_seed(0)
    ratings = pd.DataFrame(dict(user=g.choice(list('uvw'), 60), item=g.choice(list('jklm'), 60), rating=g.uniform(0, 5, 60)))
    dls = CollabDataLoaders.from_df(ratings, bs=8)
    for layers in None,[8]:
        kwargs = dict(use_nn=True, layers=layers) if layers else {}
        run(collab_learner(dls, 4, y_range=(0,5), cbs=[MixUp(.4), Check(number_loss, inputs=False)], **kwargs))
