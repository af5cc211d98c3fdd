"Regions other than the box of CutMix: share, place, and what is pasted"
import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.vision.core import TensorImage
from fastmix.core import boxes_around, draw_fourier_masks, draw_grid_masks, draw_inner_boxes, peaks, shrink_into, spectral_residual
from fastmix.mixes import Cut, FourierCut, GridCut, ResizeCut, SaliencyCut

rng = np.random.default_rng(0)
sizes = [(12,9), (1,16), (30,), (4,5,6)]

@pytest.mark.parametrize('size', sizes, ids=str)
@pytest.mark.parametrize('draw', [draw_fourier_masks, draw_grid_masks])
def test_masks_have_the_share_that_was_asked_for(draw, size):
    "To a pixel (or to what a cell covers), and on average exactly"
    lam = torch.from_numpy(rng.random(2000))
    masks = draw(lam, size, rng)
    share = masks.flatten(1).double().mean(1)
    assert masks.shape==(2000,*size) and masks.dtype==torch.bool
    if draw is draw_fourier_masks: assert (share-(1-lam)).abs().max() <= 1/masks[0].numel() + 1e-6
    assert abs((share-(1-lam)).mean()) < .01

@pytest.mark.parametrize('draw', [draw_fourier_masks, draw_grid_masks])
def test_every_place_is_pasted_as_often_as_any_other(draw):
    often = draw(torch.full((4000,), .7), (8,10), rng).double().mean(0)
    assert (often-.3).abs().max() < .05

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
    for y in range(6):
        for x in range(7):
            for i in range(6):
                for j in range(4):
                    term = spectrum[i,j]*np.exp(2j*np.pi*(fy[i,0]*y+fx[0,j]*x))
                    g[y,x] += term.real*(1 if j==0 else 2)
    n = int(got.sum())
    assert n in (25,26) and (got.numpy()==(g>=np.sort(g, None)[-n])).all()

def test_inner_boxes_lie_within_and_are_uniform():
    scale = torch.from_numpy(rng.uniform(.1, .8, 5000))
    boxes = draw_inner_boxes(scale, (20,31), rng)
    sides = (boxes[:,1]-boxes[:,0]).double()
    assert (boxes>=0).all() and (boxes[:,1]<=torch.tensor([20,31])).all()
    assert ((sides-scale[:,None]*torch.tensor([20.,31.])).abs() < 1).all()
    centre = boxes.double().mean(1)/torch.tensor([20.,31.])
    assert (centre.mean(0)-.5).abs().max() < .01 and (boxes[:,0]==0).any() and (boxes[:,1]==torch.tensor([20,31])).any()

@pytest.mark.parametrize('size,mode', [((20,),'linear'), ((12,16),'bilinear'), ((6,8,10),'trilinear')], ids=str)
def test_a_partner_is_shrunk_as_interpolate_does(size, mode):
    x,n = torch.rand(6, 2, *size), len(size)
    boxes = draw_inner_boxes(torch.tensor([.2,.4,.5,.7,.9,1.]), size, rng)
    ints = (x*100).long()
    for got,got_int,o,(a,b) in zip(shrink_into(x, boxes, size), shrink_into(ints, boxes, size), x, boxes):
        box = ...,*map(slice, a, b)
        torch.testing.assert_close(got[box], F.interpolate(o[None], tuple(b-a), mode=mode)[0], rtol=1e-4, atol=1e-5)
        nearest = F.interpolate((o*100).long()[None].double(), tuple((b-a).tolist()), mode='nearest-exact')[0]
        assert got_int[box].equal(nearest.long())

def test_all_of_the_partner_is_in_the_box():
    "And nothing else of the picture has changed"
    x = torch.rand(8, 3, 24, 30)
    plan = ResizeCut().draw(x)
    for got,own,j,(a,b) in zip(plan.mix(x), x, plan.idx, plan.boxes):
        want,box = own.clone(), (...,*map(slice, a, b))
        want[box] = F.interpolate(x[j][None], tuple(b-a), mode='bilinear')[0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

def test_boxes_keep_their_sides():
    "Before clipping: never more than the largest, and no less than the least where no border is near"
    x = torch.rand(400, 1, 40, 50)
    plan = Cut(1., min_side=.3, max_side=.5).draw(x)
    sides = plan.boxes[:,1]-plan.boxes[:,0]
    inside = ((plan.boxes[:,0]>0) & (plan.boxes[:,1]<torch.tensor([40,50]))).all(1)
    assert (sides<=torch.tensor([21,26])).all() and (sides[inside]>=torch.tensor([11,14])).all() and inside.sum()>20

@pytest.mark.parametrize('make', [lambda: Cut(min_side=-.1), lambda: Cut(max_side=1.5), lambda: ResizeCut(.5, .4), lambda: FourierCut(decay=-1.),
    lambda: FourierCut(decay=float('nan')), lambda: Cut(max_side='1'), lambda: FourierCut(decay='3'), lambda: GridCut(cells=0), lambda: GridCut(cells=2.5)])
def test_bad_settings_are_named(make):
    with pytest.raises(ValueError, match='(min_side and max_side|decay|cells) .* (is|are) '): make()

@pytest.mark.parametrize('mix', [Cut(), ResizeCut(), FourierCut(), GridCut(), SaliencyCut()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64, torch.uint8], ids=str)
def test_class_dtype_and_memory_format_survive(mix, dtype):
    x = TensorImage(torch.rand(8, 3, 12, 16)*200).to(dtype).contiguous(memory_format=torch.channels_last)
    got,kept = (plan := mix.draw(x)).mix(x),x.clone()
    assert type(got) is TensorImage and got.dtype==dtype and got.stride()==x.stride() and x.equal(kept)
    outside = ~plan.region[:,None].expand(x.shape)
    assert torch.Tensor(got)[outside].equal(torch.Tensor(x)[outside])
    empty = x[:0]
    assert mix.draw(empty).mix(empty).shape==empty.shape

@pytest.mark.parametrize('mix', [Cut(), ResizeCut(), FourierCut(), GridCut(), SaliencyCut()], ids=lambda o: type(o).__name__)
def test_no_place_no_region(mix):
    with pytest.raises(ValueError, match='no place'): mix.draw(torch.rand(4, 10))
    with pytest.raises(ValueError, match='8 samples .* batch of 5'): mix.draw(torch.rand(8, 1, 6, 6)).mix(torch.rand(5, 1, 6, 6))

# Saliency

@pytest.mark.parametrize('size', [(40,60), (300,200), (80,), (12,30,20)], ids=str)
def test_the_odd_thing_out_is_salient(size):
    "A bright block on noise, at any size and rank; the box is around it and pasted from it"
    x,at = torch.rand(6, 3, *size)*.3, torch.rand(6, len(size))*.8+.1
    for o,a in zip(x, at): o[(...,*[slice(max(0, int(c*n-.06*n)), int(c*n+.06*n)+2) for c,n in zip(a, size)])] = 1
    assert (peaks(spectral_residual(x))-at).abs().max() < .12
    plan = SaliencyCut().draw(x)
    mids,wide = plan.boxes.double()/torch.tensor(size), (1-plan.lam)>.05
    inside = ((mids[:,0]-.12<=at[plan.idx]) & (at[plan.idx]<=mids[:,1]+.12)).all(1)
    assert inside.all() and wide.any()

def test_boxes_around_a_point():
    "The share of all where nothing is clipped, and centred"
    lam = torch.tensor([.9,.75,.5])
    boxes = boxes_around(torch.full((3,2), .5), lam, (400,300))
    share = boxes.diff(dim=1)[:,0].prod(1)/120_000
    assert (share-(1-lam)).abs().max() < .01 and (boxes.double().mean(1)-torch.tensor([200.,150.])).abs().max() <= 1
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

def test_one_box_for_the_batch_and_maps_of_one_s_own():
    x = torch.rand(5, 3, 20, 20)
    plan = SaliencyCut(per_batch=True).draw(x)
    assert plan.boxes.shape==(1,2,2) and plan.shares.shape==(1,2)
    plan = SaliencyCut(saliency=lambda x: x.sum(1)).draw(x)
    peak = torch.stack([torch.stack(torch.unravel_index(o.sum(0).argmax(), (20,20))) for o in x])[plan.idx]
    assert ((plan.boxes[:,0]<=peak) & (peak<=plan.boxes[:,1])).all()
    with pytest.raises(ValueError, match='saliency must give a map'): SaliencyCut(saliency=lambda x: x).draw(x)
    with pytest.raises(TypeError, match='saliency must be a function'): SaliencyCut(saliency='spectral')
    with pytest.raises(ValueError, match='no place'): SaliencyCut().draw(torch.rand(4, 10))
    assert SaliencyCut(0).draw(x).mix(x) is x

@pytest.mark.parametrize('mix', [Cut(), ResizeCut(), FourierCut(), SaliencyCut()], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize('size', [(12,16), (150,160)], ids=str)
def test_gradients_go_back_through_a_region(mix, size):
    "Each pixel's gradient to where it came from: what is there of all samples sums to what is there of the mixture"
    x = torch.rand(6, 3, *size, requires_grad=True)
    plan = mix.draw(x)
    plan.mix(x).sum().backward()
    assert x.grad.sum().item()==pytest.approx(x.numel(), rel=1e-4)
    assert torch.allclose(plan.mix(x), plan.mix(x.detach()), atol=1e-4)
