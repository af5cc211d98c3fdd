from fastmix.core import *
from fastmix.mixes import *
from fastmix.loss import *
from fastmix.callback import *
from fastmix.data import *
from fastmix.show import *
from fastmix.check import *
from fastmix.manifold import *
