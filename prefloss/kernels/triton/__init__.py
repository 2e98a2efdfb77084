"""The ops of `chunked` in Triton kernels, under the same names."""

from prefloss.kernels.triton.backend import BackwardTiles as BackwardTiles
from prefloss.kernels.triton.backend import ForwardTiles as ForwardTiles
from prefloss.kernels.triton.launch import token_backward as token_backward
from prefloss.kernels.triton.launch import token_forward as token_forward
