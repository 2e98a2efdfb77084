"""The ops of `chunked` in Triton kernels, under the same names."""

from prefloss.kernels.triton.backend import BackwardTiles as BackwardTiles
from prefloss.kernels.triton.backend import ForwardTiles as ForwardTiles
from prefloss.kernels.triton.launch import scale_and_add_targets as scale_and_add_targets
from prefloss.kernels.triton.launch import scale_rows as scale_rows
from prefloss.kernels.triton.launch import token_backward as token_backward
from prefloss.kernels.triton.launch import token_forward as token_forward
