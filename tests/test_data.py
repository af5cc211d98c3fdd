"The side of the data: wrong labels, soft labels, second loaders, and what fastai's blocks make of them"
import random
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.core import DataLoaders, Datasets
from fastai.data.transforms import Categorize, ColReader, IndexSplitter, ItemGetter, RandomSplitter, get_image_files, parent_label
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders
from fastai.text.data import TextDataLoaders
from fastai.torch_core import set_seed
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from matplotlib import pyplot as plt
from torch import nn
from torch.testing import assert_close
from fastmix.callback import CutMix, MixUp, OneOf
from fastmix.data import CorruptLabels, SecondLoader, SoftCategorize, SoftCategory, SoftCategoryBlock, class_weights, digit_images, image_dls
from fastmix.metrics import MixMetric
from fastmix.show import mix_caption
from helpers import Record, class_dls, quiet_fit

# Wrong labels

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Pictures in a folder for each class"
    root = tmp_path_factory.mktemp('pictures')
    for i,name in enumerate(['cat','dog','owl']*20):
        (root/name).mkdir(exist_ok=True)
        PILImage.create(np.full((4,4,3), i, dtype=np.uint8)).save(root/name/f'{i}.png')
    return root

df = pd.DataFrame(dict(x=np.arange(60.), label=['cat','dog','owl']*20), index=[f'r{i}' for i in range(60)])
def species(row): return row['label']
def number(row): return torch.tensor([row['x']]).float()

def folder_block(noise): return DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=noise, splitter=RandomSplitter(seed=1))
def table_block(noise, **kwargs): return DataBlock((TransformBlock, CategoryBlock), get_x=number, get_y=noise, splitter=RandomSplitter(seed=1), **kwargs)
def labels(ds): return [ds.vocab[y] for _,y in ds]

@pytest.mark.parametrize('get_y', [parent_label, ColReader('label'), species], ids=['folder','column','function'])
def test_corrupt_labels_in_a_data_block(get_y, folder):
    "A share of the training labels and no validation label; the true ones are kept in order"
    def truth(o): return o.parent.name if get_y is parent_label else df.label[o.name]
    block,source = (folder_block, folder) if get_y is parent_label else (table_block, df)
    dsets = block(noise := CorruptLabels(.5, get_y, seed=3)).datasets(source)
    raw = [dsets.items[i] if get_y is parent_label else dsets.items.iloc[i] for i in range(60)]
    true,true_valid = ([truth(raw[i]) for i in rows] for rows in dsets.splits)
    given = labels(dsets.train)
    assert labels(dsets.valid)==true_valid
    assert list(noise.true)==true and list(noise.given)==given
    assert noise.is_wrong.tolist()==[a!=b for a,b in zip(true, given)]
    assert .15 < noise.is_wrong.float().mean() < .5
    assert labels(dsets.train)==labels(dsets.train)   # every epoch the same
    again = block(CorruptLabels(.5, get_y, seed=3)).datasets(source)
    other = block(CorruptLabels(.5, get_y, seed=4)).datasets(source)
    assert labels(again.train)==labels(dsets.train)!=labels(other.train)

def test_share_of_wrong_labels():
    big = pd.DataFrame(dict(x=np.arange(8000.), label=['cat','dog','owl','rat']*2000))
    for p in 0,.2,1.:
        noise = CorruptLabels(p, ColReader('label'))
        table_block(noise).datasets(big)
        assert noise.is_wrong.float().mean()==pytest.approx(.75*p, abs=.02)

def test_training_on_wrong_labels(folder):
    "Loaders with workers, a fit, scores on both kinds of labels, an export that loads and tells the truth of new items"
    dls = folder_block(noise := CorruptLabels(.5, parent_label)).dataloaders(folder, bs=8, num_workers=2)
    seen = sorted(dls.vocab[y] for _,yb in dls.train for y in yb)
    assert len(seen)==48 and all(seen.count(o)<=list(noise.given).count(o) for o in dls.vocab)
    dls.num_workers = 0
    learn = quiet_fit(Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), metrics=accuracy, cbs=MixUp(.4)))
    with learn.no_bar(): preds,targs = learn.get_preds(ds_idx=0)
    assert [dls.vocab[o] for o in targs]==list(noise.given)
    path = folder/'learner.pkl'
    learn.export(path)
    loaded = load_learner(path)
    valid = [dls.valid_ds.items[i] for i in range(4)]
    with loaded.no_bar(): targs = loaded.get_preds(dl=loaded.dls.test_dl(valid, with_labels=True))[1]
    assert [dls.vocab[o] for o in targs]==[o.parent.name for o in valid]

def test_datasets_and_items_that_are_tuples():
    items = [(i, 'ab'[i%2]) for i in range(40)]
    noise = CorruptLabels(.5, ItemGetter(1))
    dsets = Datasets(items, [[ItemGetter(0)],[noise, Categorize()]], splits=IndexSplitter(range(10))(items))
    assert labels(dsets.valid)==['ab'[i%2] for i in range(10)] and noise.is_wrong.any()

@pytest.mark.parametrize('p', [0,.5,1.])
def test_another_table_with_the_same_index_keeps_its_labels(p):
    other = df.assign(x=df.x+100, label=df.label.to_numpy()[::-1])
    block = table_block(CorruptLabels(p, ColReader('label')))
    dls = block.dataloaders(df, bs=8, num_workers=0)
    before = labels(dls.train_ds),labels(dls.valid_ds)
    assert labels(dls.test_dl(other, with_labels=True).dataset)==list(other.label)
    more = block.dataloaders(other, bs=8, num_workers=0)
    assert labels(more.valid_ds)==list(more.valid_ds.items.label)
    assert (labels(dls.train_ds),labels(dls.valid_ds))==before

def test_another_split_of_the_same_items_is_refused():
    "The labels of the first loaders would change"
    block = DataBlock((TransformBlock, CategoryBlock), get_x=number, get_y=CorruptLabels(.5, ColReader('label')), splitter=RandomSplitter())
    dls = block.dataloaders(df, bs=8, num_workers=0)
    before = labels(dls.train_ds),labels(dls.valid_ds)
    with pytest.raises(ValueError, match='another split.*seed'): block.dataloaders(df, bs=8, num_workers=0)
    assert (labels(dls.train_ds),labels(dls.valid_ds))==before
    same = table_block(CorruptLabels(.5, ColReader('label')))
    assert labels(same.datasets(df).train)==labels(same.datasets(df).train)

def test_a_second_loader_that_counts_its_classes_differently_is_refused():
    few = df[df.label!=sorted(set(df.label))[0]]
    def loaders(source, **kwargs): return DataBlock((TransformBlock, CategoryBlock(**kwargs)), get_x=number, get_y=ColReader('label'),
        splitter=RandomSplitter(seed=1)).dataloaders(source, bs=8, num_workers=0)
    dls,vocab = loaders(df),sorted(set(df.label))
    def learner(second): return Learner(dls, nn.Linear(1, 3), CrossEntropyLossFlat(), cbs=MixUp(.4, partners=SecondLoader.from_dls(second)))
    with pytest.raises(ValueError, match='counts its classes as.*same DataBlock'): quiet_fit(learner(loaders(few)))
    quiet_fit(learner(loaders(few, vocab=vocab)))

def test_texts_without_labels_as_partners():
    "They count their tokens as the first loader does, and no classes"
    table = pd.DataFrame(dict(text=['a b c d','d c b a','b b a a','c d c d']*10, label=['x','y']*20))
    dls = TextDataLoaders.from_df(table, text_col='text', label_col='label', valid_pct=.2, seed=1, bs=8, seq_len=20)
    second = SecondLoader(dls.test_dl(table.iloc[:16], bs=8))
    second.begin(dls.train, np.random.default_rng(0))
    assert len(second.next())==1

@pytest.mark.parametrize('p', [1.5, -.1, 'half', None, float('nan')])
def test_bad_shares(p):
    with pytest.raises(ValueError, match=f'p must be a share between 0 and 1, but it is {p!r}'): CorruptLabels(p, parent_label)

def test_bad_items():
    with pytest.raises(TypeError, match="get_y must give an item its label.*'label'"): CorruptLabels(.5, 'label')
    with pytest.raises(ValueError, match="'r3' occurs more than once.*reset_index"):
        table_block(CorruptLabels(.5, ColReader('label'))).datasets(pd.concat([df, df.iloc[3:4]]))
    arrays = DataBlock((TransformBlock, CategoryBlock), get_y=CorruptLabels(.5, len), splitter=RandomSplitter())
    with pytest.raises(TypeError, match='got a ndarray.*get_x and get_y'): arrays.datasets([np.zeros(3), np.ones(3)])

# Soft labels

votes = pd.DataFrame(np.random.default_rng(0).dirichlet([1,1,1], 40), columns=['cat','dog','owl'])
def ramp(row): return torch.arange(6)*row['cat']
def as_function(row): return [row[o] for o in votes.columns]

def soft_dls(get_y=None, **kwargs):
    set_seed(0)
    block = DataBlock((TransformBlock, SoftCategoryBlock(votes.columns)), get_x=ramp, get_y=get_y or ColReader(list(votes.columns)),
        splitter=IndexSplitter(range(16)))
    return block.dataloaders(votes, bs=8, num_workers=0, device='cpu', **kwargs)

@pytest.mark.parametrize('get_y', [None, as_function], ids=['columns','function'])
def test_soft_labels(get_y):
    dls = soft_dls(get_y)
    assert dls.c==3 and list(dls.vocab)==['cat','dog','owl']
    assert_close(dls.valid.one_batch()[1].as_subclass(torch.Tensor), torch.tensor(votes.values[:8]).float())
    learn = Learner(dls, nn.Linear(6, 3), metrics=[])
    assert isinstance(learn.loss_func, CrossEntropyLossFlat)
    x,y = dls.one_batch()
    assert_close(learn.loss_func(learn.model(x.float()), y).item(), F.cross_entropy(learn.model(x.float()), y.as_subclass(torch.Tensor)).item())

class Floats(Callback):
    order = -5
    def before_batch(self): self.learn.xb = tuple(x.float() for x in self.learn.xb)

@pytest.mark.parametrize('mixer', [MixUp(1.), MixUp(1., k=3), MixUp(1., per_batch=True), MixUp(1., y_int=False), OneOf(MixUp(1.), None, per_batch=False)], ids=repr)
@pytest.mark.parametrize('weight', [None, torch.tensor([1.,3.,.5])], ids=['plain','weighted'])
def test_soft_labels_are_mixed(mixer, weight):
    "The loss on the blended probabilities"
    loss_func = CrossEntropyLossFlat(flatten=False, weight=weight)
    learn = Learner(soft_dls(), nn.Linear(6, 3), loss_func, cbs=[Floats(), mixer, record := Record()])
    quiet_fit(learn, 2)
    for b in record.batches:
        t = torch.stack([sum(w*b['yb'][0][j] for w,j in zip(ws, js)) for ws,js in zip(b['plan'].shares.expand(b['plan'].pairs.shape), b['plan'].pairs)])
        assert b['loss'].item()==pytest.approx(F.cross_entropy(b['pred'].detach(), t.as_subclass(torch.Tensor), weight=weight).item(), rel=1e-5)

def test_soft_labels_are_shown_and_decoded(capsys):
    images,names = digit_images()
    block = DataBlock((ImageBlock, SoftCategoryBlock('abc')), get_x=lambda i: images[i], get_y=lambda i: [.7,.2,.1] if i%2 else [0,0,1],
        splitter=RandomSplitter(seed=0))
    dls = block.dataloaders(range(24), bs=4, num_workers=0)
    dls.show_batch(max_n=2)
    assert {o.get_title() for o in plt.gcf().axes} <= {'a 0.70, b 0.20, c 0.10','c 1.00'}
    assert mix_caption([.6,.4], [SoftCategory(a=.7, b=.3),SoftCategory(c=1.)])=='0.60 (a 0.70, b 0.30) + 0.40 (c 1.00)'
    dls.show_mix(MixUp(1.), max_n=4)
    assert all('+' in o.get_title() or '1.00' in o.get_title() for o in plt.gcf().axes)
    learn = quiet_fit(Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), cbs=MixUp(.4)))
    with learn.no_bar():
        label,i,probs = learn.predict(images[0])
        assert label==dls.vocab[int(i)]=='abc'[probs.argmax()] and probs.sum()==pytest.approx(1)
        learn.show_results(max_n=2)
    assert SoftCategory(a=.7, b=.3)=='a'!=SoftCategory(a=.3, b=.7) and SoftCategory(a=1)==SoftCategory(a=1)!=SoftCategory(b=1)
    plt.close('all')

@pytest.mark.parametrize('p,what', [([.7,.5,0], 'sum to 1.2: divide'), ([1.2,-.2,0], r'at least 0.*-0.2'), ([.5,.5], 'each of the 3 classes'), ([float('nan')]*3, 'sum to nan'), (.5, '3 classes')])
def test_bad_soft_labels(p, what):
    with pytest.raises(ValueError, match=what): SoftCategorize('abc').encodes(p)

# Second loaders in one call

def uneven(n=200): return pd.DataFrame(dict(x=np.arange(float(n)), label=['rare' if i%10==0 else 'usual' for i in range(n)]))

def classes(loader, n=3): return torch.cat([b[1] for _ in range(n) for b in loader.dl]).float().mean().item()

def test_balanced_loader_of_loaders_and_of_a_block():
    block = table_block(ColReader('label'))
    dls = block.dataloaders(uneven(), bs=8, num_workers=0)
    assert classes(SecondLoader.from_dls(dls))==pytest.approx(.9, abs=.03)
    for loader in SecondLoader.from_dls(dls, balanced=True), SecondLoader.from_dblock(block, uneven(), balanced=True, bs=16, num_workers=0):
        assert classes(loader)==pytest.approx(.5, abs=.08)
    assert classes(SecondLoader.from_dblock(block, uneven()))==pytest.approx(.9, abs=.03)
    assert SecondLoader.from_dls(dls, bs=5).dl.bs==5
    assert_close(np.unique(class_weights(dls)).sum(), 1/2/16 + 1/2/144, rtol=.3, atol=0)

@pytest.mark.parametrize('balanced', [False,True])
def test_second_loaders_train(balanced):
    dls = table_block(ColReader('label')).dataloaders(uneven(), bs=8, num_workers=0, device='cpu')
    mixer = MixUp(1., partners=SecondLoader.from_dls(dls, balanced=balanced))
    set_seed(0)
    learn = Learner(dls, nn.Linear(1, 2), metrics=MixMetric(accuracy), cbs=[mixer, record := Record()])
    quiet_fit(learn, 2)
    assert all((b['plan'].idx>=8).all() for b in record.batches)

def test_drawing_evenly_leaves_global_streams_alone():
    dls = table_block(ColReader('label')).dataloaders(uneven(), bs=8, num_workers=0)
    loader = SecondLoader.from_dls(dls, balanced=True)
    set_seed(3)
    before = random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state().tolist()
    a = loader.dl.get_idxs()
    assert a!=loader.dl.get_idxs()
    assert before==(random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state().tolist())

def test_balanced_tables_texts_and_plain_tensors():
    t = uneven().assign(kind=['p','q']*100)
    tables = TabularDataLoaders.from_df(t, procs=[Categorify,Normalize], cat_names=['kind'], cont_names=['x'], y_names='label', bs=8)
    assert torch.cat([b[2] for b in SecondLoader.from_dls(tables, balanced=True).dl]).float().mean()==pytest.approx(.5, abs=.15)
    texts = TextDataLoaders.from_df(t.assign(text=[f'word {i}' for i in range(200)]), text_col='text', label_col='label', bs=8)
    assert classes(SecondLoader.from_dls(texts, balanced=True))==pytest.approx(.5, abs=.1)
    assert len(SecondLoader.from_dls(class_dls(), balanced=True).next())==2

def test_numbers_can_not_be_balanced():
    items = list(zip(torch.randn(16, 6), torch.rand(16, 1)))
    with pytest.raises(ValueError, match='one class for each item, but the targets are float'):
        SecondLoader.from_dls(DataLoaders.from_dsets(items, items, bs=4, num_workers=0), balanced=True)

def test_show_mix_before_there_is_a_learner():
    dls = image_dls(*digit_images(), size=8, bs=8)
    dls.show_mix(CutMix(), max_n=4, nrows=2)
    assert len([o for o in plt.gcf().axes if o.get_title()])==4
    plt.close('all')
