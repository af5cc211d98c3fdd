"Wrong labels and soft ones: which they are, and what fastai's blocks make of them"
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.core import Datasets
from fastai.data.transforms import Categorize, ColReader, IndexSplitter, ItemGetter, RandomSplitter, get_image_files, parent_label
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.core import PILImage
from fastai.vision.data import ImageBlock
from matplotlib import pyplot as plt
from torch import nn
from torch.testing import assert_close
from fastmix.data import CorruptLabels, SoftCategorize, SoftCategory, SoftCategoryBlock, corrupt_labels, digit_images, folder_images
from fastmix.mixers import MixUp, OneOf
from fastmix.show import mix_caption
from helpers import name_of, quiet_fit, Record

# Wrong labels

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Images in a folder for each class"
    root = tmp_path_factory.mktemp('images')
    for i,name in enumerate(['cat','dog','owl']*20):
        (root/name).mkdir(exist_ok=True)
        PILImage.create(np.full((4,4,3), i, dtype=np.uint8)).save(root/name/f'{i}.png')
    return root

df = pd.DataFrame(dict(x=np.arange(60.), label=['cat','dog','owl']*20), index=[f'r{i}' for i in range(60)])
def species(row): return row['label']
def number(row): return torch.tensor([row['x']]).float()

def folder_block(noise): return DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=noise, splitter=RandomSplitter(seed=1))
def table_block(noise, splitter=RandomSplitter(seed=1)): return DataBlock((TransformBlock, CategoryBlock), get_x=number, get_y=noise, splitter=splitter)
def labels(ds): return [ds.vocab[y] for _,y in ds]
def both_labels(dls): return labels(dls.train_ds),labels(dls.valid_ds)

@pytest.mark.parametrize('get_y', [parent_label, ColReader('label'), species], ids=['folder','column','function'])
def test_corrupt_labels_in_a_data_block(get_y, folder):
    "A fraction of the training labels and no validation label; the true ones are kept in order"
    def truth(o): return o.parent.name if get_y is parent_label else df.label[o.name]
    block,source = (folder_block, folder) if get_y is parent_label else (table_block, df)
    dsets = block(noise := CorruptLabels(.5, get_y, seed=3)).datasets(source)
    raw = [dsets.items[i] if get_y is parent_label else dsets.items.iloc[i] for i in range(60)]
    true,true_valid = ([truth(raw[i]) for i in rows] for rows in dsets.splits)
    found = labels(dsets.train)
    assert labels(dsets.valid)==true_valid
    assert list(noise.true)==true and list(noise.labels)==found
    assert noise.is_wrong.tolist()==[a!=b for a,b in zip(true, found)]
    assert .15 < noise.is_wrong.float().mean() < .5
    assert labels(dsets.train)==found   # every epoch the same
    again = block(CorruptLabels(.5, get_y, seed=3)).datasets(source)
    other = block(CorruptLabels(.5, get_y, seed=4)).datasets(source)
    assert labels(again.train)==found!=labels(other.train)

def test_fraction_of_wrong_labels():
    big = pd.DataFrame(dict(x=np.arange(3000.), label=['cat','dog','owl']*1000))
    for p in 0,.2,1.:
        noise = CorruptLabels(p, ColReader('label'))
        table_block(noise).datasets(big)
        assert noise.is_wrong.float().mean()==pytest.approx(2*p/3, abs=.03)

def test_training_on_wrong_labels(folder):
    "Loaders with workers, a fit, scores on both kinds of labels, an export that loads and knows the true labels of new items"
    dls = folder_block(noise := CorruptLabels(.5, parent_label)).dataloaders(folder, bs=8, num_workers=2)
    seen = sorted(dls.vocab[y] for _,yb in dls.train for y in yb)
    assert len(seen)==48 and all(seen.count(o)<=list(noise.labels).count(o) for o in dls.vocab)
    dls.num_workers = 0
    learn = quiet_fit(Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), metrics=accuracy, cbs=MixUp(.4)))
    with learn.no_bar(): targs = learn.get_preds(ds_idx=0)[1]
    assert [dls.vocab[o] for o in targs]==list(noise.labels)
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

@pytest.mark.parametrize('p', [0,.5])
def test_another_table_with_the_same_index_keeps_its_labels(p):
    other = df.assign(x=df.x+100, label=df.label.to_numpy()[::-1])
    block = table_block(CorruptLabels(p, ColReader('label')))
    dls = block.dataloaders(df, bs=8, num_workers=0)
    before = both_labels(dls)
    assert labels(dls.test_dl(other, with_labels=True).dataset)==list(other.label)
    more = block.dataloaders(other, bs=8, num_workers=0)
    assert labels(more.valid_ds)==list(more.valid_ds.items.label)
    assert both_labels(dls)==before

def test_another_split_of_the_same_items_is_refused():
    "The labels of the first loaders would change"
    block = table_block(CorruptLabels(.5, ColReader('label')), RandomSplitter())
    dls = block.dataloaders(df, bs=8, num_workers=0)
    before = both_labels(dls)
    with pytest.raises(ValueError, match='another split.*seed'): block.dataloaders(df, bs=8, num_workers=0)
    assert both_labels(dls)==before
    same = table_block(CorruptLabels(.5, ColReader('label')))
    assert labels(same.datasets(df).train)==labels(same.datasets(df).train)

@pytest.mark.parametrize('p', [1.5, 'half', None, float('nan')])
def test_bad_fractions(p):
    for f in lambda: CorruptLabels(p, parent_label),lambda: corrupt_labels(['a','b'], p):
        with pytest.raises(ValueError, match=f'p must be a fraction between 0 and 1, but it is {p!r}'): f()

def test_bad_items():
    with pytest.raises(TypeError, match="get_y must be a function that returns the label.*'label'"): CorruptLabels(.5, 'label')
    with pytest.raises(TypeError, match=r"one label for each sample, but the first of them is \['a'\]"): corrupt_labels([['a'],['b']], .5)
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

weights = torch.tensor([1.,3.,.5])

@pytest.mark.parametrize('mixer,weight', [(MixUp(1.),None), (MixUp(1.),weights), (MixUp(1., k=3),None), (MixUp(1., per_batch=True),weights),
    (MixUp(1., y_int=False),weights), (OneOf(MixUp(1.), None, per_batch=False),None)], ids=name_of)
def test_soft_labels_are_mixed(mixer, weight):
    "The loss on the blended probabilities"
    loss_func = CrossEntropyLossFlat(flatten=False, weight=weight)
    learn = Learner(soft_dls(), nn.Linear(6, 3), loss_func, cbs=[Floats(), mixer, record := Record()])
    quiet_fit(learn, 2)
    for b in record.batches:
        t = torch.stack([sum(w*b['yb'][0][j] for w,j in zip(ws, js)) for ws,js in zip(b['plan'].weights.expand(b['plan'].pairs.shape), b['plan'].pairs)])
        assert b['loss'].item()==pytest.approx(F.cross_entropy(b['pred'].detach(), t.as_subclass(torch.Tensor), weight=weight).item(), rel=1e-5)

def test_soft_labels_are_shown_and_decoded():
    images,_ = digit_images()
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

bad = [([.7,.5,0], 'sum to 1.2: divide'), ([1.2,-.2,0], r'at least 0.*-0.2'), ([.5,.5], 'each of the 3 classes'), ([float('nan')]*3, 'sum to nan'), (.5, '3 classes')]

@pytest.mark.parametrize('p,what', bad, ids=name_of)
def test_bad_soft_labels(p, what):
    with pytest.raises(ValueError, match=what): SoftCategorize('abc').encodes(p)

def test_a_folder_that_is_not_there():
    with pytest.raises(ValueError, match='nowhere must hold a subfolder.*does not exist'): folder_images('nowhere')
