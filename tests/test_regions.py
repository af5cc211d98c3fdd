"Regions: how large, where, and what is pasted"
import math
import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.torch_core import TensorImage
from torch.testing import assert_close
from fastmix.core import draw_partners
from fastmix.mixers import CutMix, SaliencyMix
from fastmix.regions import (Boxes, Mask, ShrunkBoxes, box_mask, boxes_around, draw_boxes, draw_fourier_masks, draw_grid_masks, draw_inner_boxes,
    highest_points, image_size, paste_mask, shrink_into, spectral_residual)
from helpers import name_of

rng = np.random.default_rng(0)
draws = [draw_fourier_masks, draw_grid_masks]

# Drawing

@pytest.mark.parametrize('size', [(8,8), (1,12), (12,1), (11,), (5,4,3)], ids=name_of)
def test_boxes_against_the_paper(size):
    "The mean area is that of a box of sides √(1-λ), centred anywhere and clipped, by Monte Carlo; every pixel is pasted"
    for lam in (.1, .5, .95):
        n,side = 40_000, (1-lam)**(1/len(size))
        c = rng.random((n, len(size)))
        want = (np.minimum(c+side/2, 1) - np.maximum(c-side/2, 0)).prod(1)
        boxes = draw_boxes(torch.full((n,), lam), size, rng)
        mask = box_mask(boxes, size)
        area = mask.flatten(1).double().mean(1)
        assert boxes.shape==(n,2,len(size)) and boxes.dtype==torch.int64 and (boxes>=0).all() and (boxes<=torch.tensor(size)).all()
        assert abs(area.mean()-want.mean()) < 4*math.hypot(area.std(), want.std())/n**.5 and mask.any(0).all()

def test_box_mask():
    "Pixel by pixel"
    boxes = torch.tensor([[[0,1,0],[2,3,4]], [[1,1,1],[1,3,4]], [[-1,2,3],[9,9,9]]])
    for box,mask in zip(boxes.tolist(), box_mask(boxes, (3,3,4))):
        for at in np.ndindex(3, 3, 4): assert mask[at]==all(a<=i<b for i,a,b in zip(at, *box))

@pytest.mark.parametrize('size', [(12,9), (1,16), (30,), (4,5,6)], ids=name_of)
@pytest.mark.parametrize('draw', draws)
def test_masks_have_the_area_that_was_asked_for(draw, size):
    "To a pixel (or to what a cell covers), and on average exactly"
    lam = torch.from_numpy(rng.random(2000))
    masks = draw(lam, size, rng)
    area = masks.flatten(1).double().mean(1)
    assert masks.shape==(2000,*size) and masks.dtype==torch.bool and abs((area-(1-lam)).mean()) < .01
    if draw is draw_fourier_masks: assert (area-(1-lam)).abs().max() <= 1/masks[0].numel() + 1e-6

@pytest.mark.parametrize('draw', draws)
def test_every_place_is_pasted_as_often_as_any_other(draw):
    often = draw(torch.full((4000,), .7), (8,10), rng).double().mean(0)
    assert (often-.3).abs().max() < .05

def test_grid_masks_are_made_of_cells():
    for m in draw_grid_masks(torch.full((20,), .6), (6,9), rng, cells=3): assert m.equal(m[::2,::3].repeat_interleave(2, 0).repeat_interleave(3, 1)) and m.any()

def test_smoothness_grows_with_decay():
    "Neighbours differ less often, and at δ=0 as often as in white noise: 2 λ (1-λ)"
    def border(decay):
        m = draw_fourier_masks(torch.full((200,), .5), (32,32), rng, decay)
        return (m[:,1:]!=m[:,:-1]).double().mean()
    a,b,c = border(0.), border(1.5), border(3.)
    assert abs(a-.5) < .01 and a > 2*b > 4*c

def test_a_fourier_mask_is_the_highest_part_of_the_paper_s_landscape():
    "Against a transform of all frequencies, term by term, from the same noise"
    got = draw_fourier_masks(torch.tensor([.4]), (6,7), np.random.default_rng(3), 1.)[0]
    z = np.random.default_rng(3).standard_normal((1,6*4,2)) @ [1,1j]
    fy,fx = np.fft.fftfreq(6)[:,None], np.fft.rfftfreq(7)[None]
    spectrum = z.reshape(6,4) / np.maximum(np.hypot(fy, fx)*7, 1)
    g = np.zeros((6,7))
    for y,x,i,j in np.ndindex(6, 7, 6, 4): g[y,x] += (spectrum[i,j]*np.exp(2j*np.pi*(fy[i,0]*y+fx[0,j]*x))).real*(1 if j==0 else 2)
    n = int(got.sum())
    assert n in (25,26) and (got.numpy()==(g>=np.sort(g, None)[-n])).all()

def test_inner_boxes_lie_within_and_are_uniform():
    scale,size = torch.from_numpy(rng.uniform(.1, .8, 5000)),torch.tensor([20,31])
    boxes = draw_inner_boxes(scale, (20,31), rng)
    sides = (boxes[:,1]-boxes[:,0]).double()
    assert (boxes>=0).all() and (boxes[:,1]<=size).all() and ((sides-scale[:,None]*size).abs() < 1).all()
    assert abs((sides/size).mean(1)-scale).mean() < .03 and abs((sides-scale[:,None]*size).mean()) < .05
    centre = boxes.double().mean(1)/size
    assert (centre.mean(0)-.5).abs().max() < .01 and (boxes[:,0]==0).any() and (boxes[:,1]==size).any()

def test_no_place_no_region():
    assert image_size(torch.rand(2, 3, 4, 5, 6))==(4,5,6)
    assert image_size(torch.rand(2, 64, 4, 4))==(4,4) and image_size(torch.rand(2, 1, 9, 1))==(9,1)
    with pytest.raises(ValueError, match=r'shape \(4, 10\) has no place'): image_size(torch.rand(4, 10))

@pytest.mark.parametrize('shape,what', [((8,16,16,3), 'channels last: pass x.movedim'), ((8,128,3), 'channels last'), ((8,16,16,16,1), 'channels last'),
    ((8,64,64,10), 'channels last'), ((8,32,32,32,6), 'channels last'), ((8,1000,12), 'channels last'), ((8,16,2,24,16), 'frames'), ((8,4,3,16,16), r'frames of images.*CutMix\(spatial_dims=2\)'), ((8,30,1,16,16), 'frames')], ids=name_of)
def test_channels_and_times_are_no_places(shape, what):
    with pytest.raises(ValueError, match=what): image_size(torch.rand(shape))
    assert image_size(torch.rand(shape), 2)==shape[-2:]

# Pasting

def pairs_of(n): return torch.stack([torch.arange(n), draw_partners(n, rng)], 1)

def regions_of(n, size):
    lam = torch.from_numpy(rng.random(n))
    yield Boxes(draw_boxes(lam, size, rng), size)
    yield ShrunkBoxes(draw_inner_boxes(lam.sqrt(), size, rng), size)
    yield Mask(draw_fourier_masks(lam, size, rng), size)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.bool], ids=name_of)
def test_class_dtype_and_memory_format_survive(dtype):
    x = TensorImage(torch.rand(8, 3, 12, 16)*200).to(dtype).contiguous(memory_format=torch.channels_last)
    kept,pairs = x.clone(),pairs_of(8)
    for region in regions_of(8, (12,16)):
        got = region.paste(x, pairs)
        assert type(got) is TensorImage and got.dtype==dtype and got.stride()==x.stride() and got is not x and x.equal(kept)
        outside = ~region.mask[:,None].expand(x.shape)
        assert got.as_subclass(torch.Tensor)[outside].equal(x.as_subclass(torch.Tensor)[outside])
        assert region.take(torch.arange(0), 8).paste(x[:0], pairs[:0]).shape==(0,3,12,16)

@pytest.mark.parametrize('size', [(40,), (12,16), (100,120), (6,8,10)], ids=name_of)
def test_paste_sample_by_sample(size):
    "A region for each sample or one for all, rows in any order, partners after the batch, one channel dimension or two"
    for x in torch.rand(7, 2, *size), (torch.rand(7, 2, 2, *size)*100).byte():
        for pairs,in_order in (torch.tensor([[0,5],[1,6],[2,4],[3,5]]),True), (torch.tensor([[6,5],[1,1],[2,4],[2,0]]),False):
            for n in 4,1:
                for region in regions_of(n, size):
                    if isinstance(region, ShrunkBoxes): continue
                    got,masks = region.paste(x, pairs, in_order),region.mask.expand(4, *size)
                    for o,(i,j),m in zip(got, pairs, masks): assert o[...,m].equal(x[j][...,m]) and o[...,~m].equal(x[i][...,~m])
                    assert_close(region.lam, 1-region.mask.flatten(1).float().mean(1)) and region.lam.shape==(n,)

@pytest.mark.parametrize('size', [(20,), (150,), (12,16), (150,160), (6,8,10), (30,30,30)], ids=name_of)
def test_all_of_the_partner_is_in_the_box(size):
    "As `F.interpolate` shrinks it, to the nearest pixel where it holds integers; nothing else changes, and an empty box changes nothing"
    x,pairs = torch.rand(5, 2, *size),pairs_of(5)
    ints,mode = (x*100).long(),['linear','bilinear','trilinear'][len(size)-1]
    boxes = draw_inner_boxes(torch.tensor([.2,.5,.7,1.,0.]), size, rng)
    region = ShrunkBoxes(boxes, size)
    for got,got_int,(i,j),(a,b) in zip(region.paste(x, pairs), region.paste(ints, pairs), pairs, boxes):
        want,want_int,box,to = x[i].clone(),ints[i].clone(),(...,*map(slice, a, b)),tuple((b-a).tolist())
        if all(to):
            want[box] = F.interpolate(x[j][None], to, mode=mode)[0]
            want_int[box] = ints[j][(slice(None), *np.ix_(*[(2*np.arange(m)+1)*n//(2*m) for m,n in zip(to, size)]))]   # in whole numbers
        assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert got_int.equal(want_int)
    for o,(a,b),whole in zip(shrink_into(x, boxes, size)[:4], boxes, x):
        assert_close(o[(...,*map(slice, a, b))], F.interpolate(whole[None], tuple((b-a).tolist()), mode=mode)[0], rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('size', [(12,16), (150,160)], ids=name_of)
def test_gradients_go_back_through_a_region(size):
    "Each pixel's gradient to where it came from: what is there of all samples sums to what is there of the mixture"
    for region in regions_of(6, size):
        x,pairs = torch.rand(6, 3, *size, requires_grad=True),pairs_of(6)
        mixed = region.paste(x, pairs)
        mixed.sum().backward()
        assert x.grad.sum().item()==pytest.approx(x.numel(), rel=1e-4)
        assert torch.allclose(mixed, region.paste(x.detach(), pairs), atol=1e-4)

def test_a_box_is_clipped():
    x,pairs = torch.arange(2.).view(2,1,1,1).expand(2,1,8,8), torch.tensor([[0,1],[1,0]])
    for box,area in ([[-3,-2],[2,3]],6), ([[5,5],[9,20]],9), ([[4,4],[3,6]],0):
        region = Boxes(torch.tensor([box]), (8,8))
        assert region.lam.item()==1-area/64
        for o in x, x.clone().requires_grad_(): assert_close(region.paste(o, pairs).mean((1,2,3)), torch.cat([1-region.lam, region.lam]))

def test_complex_numbers_keep_their_lazy_bits():
    x,pairs,region = torch.randn(2, 1, 8, 8, dtype=torch.complex64),torch.tensor([[0,1],[1,0]]),Boxes(torch.tensor([[[1,2],[5,9]]]), (8,8))
    for o in x.conj(), x.conj().imag: assert region.paste(o, pairs).equal(torch.where(box_mask(region.where, (8,8))[:,None], o.flip(0), o))

def test_paste_mask():
    "One mask or many, whatever lies between batch and image"
    for shape in (3,4,5), (3,2,4,5), (3,2,6,4,5):
        x,x1 = torch.rand(2, *shape)
        for mask in torch.rand(3, 4, 5)<.5, torch.rand(1, 4, 5)<.5:
            for o,a,b,m in zip(paste_mask(x, x1, mask), x, x1, mask.expand(3, 4, 5)): assert o[...,m].equal(b[...,m]) and o[...,~m].equal(a[...,~m])

def test_what_is_cut_along():
    "Whatever has the image's size; a float target of a signal's length could also be labels, so nothing is guessed"
    image,signal = Boxes(torch.zeros(1, 2, 2).long(), (6,7)),Mask(torch.zeros(1, 10).bool(), (10,))
    assert all(map(image.is_over, (torch.rand(8, 6, 7), torch.rand(8, 3, 6, 7), torch.zeros(8, 6, 7).long())))
    assert not any(map(image.is_over, (torch.rand(8), torch.rand(8, 7), torch.zeros(6, 7).long())))
    for wrong in torch.rand(8, 3, 7, 6), torch.zeros(8, 12, 14).long():
        with pytest.raises(ValueError, match=r'Cannot cut a tensor of shape \(8, .* images of size \(6, 7\)'): image.is_over(wrong)
    with pytest.raises(ValueError, match='channel dimension'): signal.is_over(torch.eye(10)[:8])
    assert not signal.is_over(torch.rand(8, 9)) and signal.is_over(torch.rand(8, 1, 10)) and signal.is_over(torch.randint(0, 4, (8, 10)))

def test_some_of_the_samples():
    for region in regions_of(5, (6,8)):
        rows,off = torch.tensor([3,0,3]),torch.tensor([True,False,True,False,False])
        assert region.take(rows, 5).mask.equal(region.mask[rows]) and type(region.take(rows, 5)) is type(region)
        assert region.empty(off).mask.equal(region.mask & ~off[:,None,None]) and (region.empty(off).lam[off]==1).all()
        one = region.take(torch.tensor([2]), 5)
        assert one.take(rows, 5) is one and one.empty(off).mask.equal(one.mask & ~off[:,None,None])
        assert region.to(torch.device('meta')).where.is_meta

# Saliency

@pytest.mark.parametrize('size', [(40,60), (300,200), (80,), (12,30,20)], ids=name_of)
def test_the_odd_thing_out_is_salient(size):
    "A bright block on noise, at any size and rank; the box is around it and pasted from it"
    x,at = torch.rand(6, 3, *size)*.3, torch.rand(6, len(size))*.8+.1
    for o,a in zip(x, at): o[(...,*[slice(max(0, int(c*n-.06*n)), int(c*n+.06*n)+2) for c,n in zip(a, size)])] = 1
    assert (highest_points(spectral_residual(x))-at).abs().max() < .12
    plan = SaliencyMix().draw(x)
    ends = plan.region.where.double()/torch.tensor(size)
    assert ((ends[:,0]-.12<=at[plan.idx]) & (at[plan.idx]<=ends[:,1]+.12)).all() and ((1-plan.lam)>.05).any()

def test_boxes_around_a_point():
    "The area that was asked for where nothing is clipped, and centred"
    lam = torch.tensor([.9,.75,.5])
    boxes = boxes_around(torch.full((3,2), .5), lam, (400,300))
    area = boxes.diff(dim=1)[:,0].prod(1)/120_000
    assert (area-(1-lam)).abs().max() < .01 and (boxes.double().mean(1)-torch.tensor([200.,150.])).abs().max() <= 1
    assert boxes_around(torch.tensor([[0.,1.]]), torch.tensor([.75]), (40,40)).tolist()==[[[0,30],[10,40]]]

def test_saliency_by_hand():
    "The formula, with NumPy"
    x = torch.rand(2, 1, 16, 16)
    for o,got in zip(x[:,0].double().numpy(), spectral_residual(x, sigma=1.).double().numpy()):
        z = np.fft.fft2(o)
        log = np.log(np.abs(z)+1e-8)
        local = sum(np.roll(log, (i,j), (0,1)) for i in (-1,0,1) for j in (-1,0,1))/9
        s = np.abs(np.fft.ifft2(np.exp(log-local+1j*np.angle(z))))**2
        d = np.minimum(np.arange(16), 16-np.arange(16))
        g = np.exp(-(d[:,None]**2+d[None]**2)/2)
        want = np.real(np.fft.ifft2(np.fft.fft2(s)*np.fft.fft2(g/g.sum())))
        np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-5)

# In the mixers

def test_boxes_keep_their_sides():
    "Before clipping: never more than the largest, and no less than the least where no border is near"
    boxes = CutMix(1., min_side=.3, max_side=.5).draw(torch.rand(400, 1, 40, 50)).region.where
    sides = boxes[:,1]-boxes[:,0]
    inside = ((boxes[:,0]>0) & (boxes[:,1]<torch.tensor([40,50]))).all(1)
    assert (sides<=torch.tensor([21,26])).all() and (sides[inside]>=torch.tensor([11,14])).all() and inside.sum()>20

def test_one_box_for_the_batch_and_maps_of_one_s_own():
    x = torch.rand(5, 3, 20, 20)
    plan = SaliencyMix(per_batch=True).draw(x)
    assert plan.region.where.shape==(1,2,2) and plan.weights.shape==(1,2)
    plan = SaliencyMix(saliency=lambda x: x.sum(1)).draw(x)
    peak = torch.stack([torch.stack(torch.unravel_index(o.sum(0).argmax(), (20,20))) for o in x])[plan.idx]
    assert ((plan.region.where[:,0]<=peak) & (peak<=plan.region.where[:,1])).all()
