"What a batch must be to be mixed, and the record of a mixed one"
import pytest, torch, torch.nn.functional as F
from fastai.data.core import DataLoaders
from fastai.losses import MSELossFlat
from fastai.vision.core import TensorBBox
from torch import nn
from torchvision.tv_tensors import BoundingBoxes, KeyPoints, Mask
from fastmix.batch import check_batch, check_types, depends_on
from fastmix.mixers import CutMix, MixUp
from helpers import mk_dls, mk_learn, quiet_fit, Record

x,y = torch.rand(16, 1, 8, 8),torch.arange(16)%3
box = BoundingBoxes(torch.tensor([[0.,0,4,4]]), format='XYXY', canvas_size=(8,8))

# Labels among inputs
class Margin(nn.Module):
    "A margin head: it subtracts a margin from the true class"
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(64, 3)
    def forward(self, x, y): return self.lin(x.flatten(1)) - .35*F.one_hot(y.view(len(x), -1)[:,0], 3)

@pytest.mark.parametrize('bs', [4, 8])
@pytest.mark.parametrize('label', [y, y[:,None], torch.stack([y, y.flip(0)], 1)], ids=['classes','column','one of two'])
def test_labels_that_are_inputs_are_refused(label, bs):
    learn = mk_learn(mk_dls([x,label], [y], n_inp=2, bs=bs), Margin(), cbs=MixUp(1.))
    with pytest.raises(ValueError, match='its labels, .* have the loss add the margin.*ManifoldMixUp'): quiet_fit(learn)

def test_categories_that_are_no_labels_are_mixed():
    quiet_fit(mk_learn(mk_dls([x,torch.randint(0, 3, (16,))], [y], n_inp=2), Margin(), cbs=MixUp(1.)))
    agrees = torch.where(torch.arange(16)<15, y, 0)   # a category that is looked up as a vector is no margin
    quiet_fit(mk_learn(mk_dls([agrees], [y]), nn.Embedding(3, 3), cbs=MixUp(1.)))

# Tensors that are not dense
@pytest.mark.parametrize('o', [torch.eye(4).to_sparse(), torch.eye(4).to_sparse_csr(), torch.nested.nested_tensor([torch.rand(3), torch.rand(2)])], ids=['coo','csr','nested'])
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_tensors_that_are_not_dense(o):
    for xb,yb in ((o,),()),((torch.rand(len(o) if not o.is_nested else 2, 3),),(o,)):
        with pytest.raises(TypeError, match='Only dense tensors can be mixed'): check_batch(xb, yb)

# Types of torchvision
def items_of(target, n=8): return DataLoaders.from_dsets(*[[(o,target) for o in x[:n]]]*2, bs=4, num_workers=0)

@pytest.mark.parametrize('target', [box, TensorBBox(torch.rand(1, 4)), dict(boxes=box), (box,torch.tensor(1))], ids=['torchvision','fastai','dict','tuple'])
def test_boxes_are_found_in_items(target):
    for loader in items_of(target).train, torch.utils.data.DataLoader([(o,target) for o in x[:8]], 4):
        with pytest.raises(TypeError, match='Bounding boxes cannot be mixed'): check_types(loader)
    with pytest.raises(TypeError, match='Bounding boxes'): check_batch((x[:1],), (box,))

def test_boxes_are_refused_before_a_fit():
    learn = mk_learn(items_of(box), nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Unflatten(1, (1,4))), MSELossFlat(), cbs=MixUp(1.))
    with pytest.raises(TypeError, match='Bounding boxes'): quiet_fit(learn)

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return iter(x)

def test_looking_at_an_item_draws_no_random_number():
    class Noise(list):
        def __getitem__(self, i): return torch.rand(3)
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    check_types(torch.utils.data.DataLoader(Noise([0]), 1))
    assert torch.rand(3).equal(want)
    for no_items in object(),torch.utils.data.DataLoader(Stream()): check_types(no_items)

def test_masks_and_points_of_torchvision():
    "Masks are cut with their images, and points are blended, as fastai's own"
    masks = [(o, Mask((o[0]>.5).long())) for o in x]
    learn = mk_learn(DataLoaders.from_dsets(masks, masks, bs=4, num_workers=0), nn.Conv2d(1, 2, 1), cbs=[CutMix(), Record()])
    for b in quiet_fit(learn).record.batches:
        plan,y = b['plan'],b['yb'][0]
        torch.testing.assert_close(b['loss'], F.cross_entropy(b['pred'], torch.where(plan.region.mask, y[plan.idx], y).as_subclass(torch.Tensor)))
    points = [(o, KeyPoints(torch.rand(2, 2)*8, canvas_size=(8,8))) for o in x]
    def learner(mixer):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Unflatten(1, (2,2)))
        return mk_learn(DataLoaders.from_dsets(points, points, bs=4, num_workers=0), model, MSELossFlat(), cbs=[mixer, Record()])
    for b in quiet_fit(learner(MixUp(1.))).record.batches:
        y,lam = b['yb'][0].as_subclass(torch.Tensor),b['plan'].lam[:,None,None]
        torch.testing.assert_close(b['loss'], F.mse_loss(b['pred'], lam*y + (1-lam)*y[b['plan'].idx]))
    with pytest.raises(ValueError, match='Cannot cut'): quiet_fit(learner(CutMix()))

# What is trained
def test_a_loss_depends_on_what_it_is_made_of():
    a,b = torch.rand(3, requires_grad=True),torch.rand(3, requires_grad=True)
    loss,other = a.square().sum(),b.sum()
    assert depends_on(loss/2+other, [loss]) and depends_on((3*loss).exp().mean(), [other,loss])
    assert not depends_on(other+a.sum(), [loss])
