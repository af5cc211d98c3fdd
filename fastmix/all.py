"What users write: `from fastmix.all import *`, after fastai's own"
from fastmix.calls import MixCalls
from fastmix.check import check_mix
from fastmix.data import CorruptLabels, SoftCategoryBlock, corrupt_labels, digit_images, folder_images, image_dls, photo_images
from fastmix.gan import GANMixUp
from fastmix.handler import MixHandler, find_mixer
from fastmix.log import LogMix
from fastmix.loop import MixCollate
from fastmix.losses import ClassBCELoss, MixLoss, MultiLoss
from fastmix.manifold import ManifoldMixUp
from fastmix.metrics import CalibrationError, CleanLoss, MixMetric
from fastmix.beta import BetaMix, RegionMix
from fastmix.mixers import CutMix, CutMixUp, FMix, GridMix, MixUp, OneOf, ResizeMix, SaliencyMix
from fastmix.partners import SecondLoader, balanced, derange, near_target, other_class, same_class
from fastmix.plan import Plan
from fastmix.regions import Boxes, Mask, spectral_residual
from fastmix.soft import SoftMix
from fastmix.variants import RegMixUp, Remix, lisa
from fastmix.show import *   # show_mix and plot_lam, as methods

__all__ = ['MixUp', 'CutMix', 'ResizeMix', 'SaliencyMix', 'FMix', 'GridMix', 'ManifoldMixUp', 'OneOf', 'CutMixUp', 'RegMixUp', 'Remix',
    'derange', 'same_class', 'other_class', 'balanced', 'near_target', 'lisa', 'SecondLoader',
    'MixLoss', 'MultiLoss', 'ClassBCELoss', 'MixMetric', 'CleanLoss', 'CalibrationError',
    'CorruptLabels', 'corrupt_labels', 'SoftCategoryBlock', 'image_dls', 'digit_images', 'photo_images', 'folder_images',
    'check_mix', 'find_mixer', 'MixCollate', 'SoftMix', 'MixCalls', 'LogMix', 'GANMixUp',
    'MixHandler', 'BetaMix', 'RegionMix', 'Plan', 'Boxes', 'Mask', 'spectral_residual']
