"""Every check: takes a loss, its spec, its name or its function, and returns nothing if the loss has the property.

A check raises `CheckFailed` with the values, the draw and what to change if the loss lacks the property; `Skip` if the
property does not apply.
"""

from prefloss.testing.declared import check_documentation as check_documentation
from prefloss.testing.declared import check_hyperparameter_effect as check_hyperparameter_effect
from prefloss.testing.declared import check_hyperparameters as check_hyperparameters
from prefloss.testing.declared import check_pickle as check_pickle
from prefloss.testing.declared import check_repr as check_repr
from prefloss.testing.declared import check_state as check_state
from prefloss.testing.dependence import check_beta as check_beta
from prefloss.testing.dependence import check_difference_only as check_difference_only
from prefloss.testing.dependence import check_monotone as check_monotone
from prefloss.testing.dependence import check_needs as check_needs
from prefloss.testing.dependence import check_needs_reference as check_needs_reference
from prefloss.testing.dependence import check_preference as check_preference
from prefloss.testing.dependence import check_separability as check_separability
from prefloss.testing.derivatives import check_data_gradient as check_data_gradient
from prefloss.testing.derivatives import check_gradient_nonzero as check_gradient_nonzero
from prefloss.testing.derivatives import check_gradients as check_gradients
from prefloss.testing.derivatives import check_torch_compile as check_torch_compile
from prefloss.testing.derivatives import check_torch_func as check_torch_func
from prefloss.testing.learning import check_direction as check_direction
from prefloss.testing.learning import check_sides as check_sides
from prefloss.testing.numerics import check_extremes as check_extremes
from prefloss.testing.numerics import check_nan as check_nan
from prefloss.testing.numerics import check_precision as check_precision
from prefloss.testing.run import CHECKS as CHECKS
from prefloss.testing.run import FIRST as FIRST
from prefloss.testing.run import loss_checks as loss_checks
from prefloss.testing.run import names as names
from prefloss.testing.values import check_batch_permutation as check_batch_permutation
from prefloss.testing.values import check_determinism as check_determinism
from prefloss.testing.values import check_device as check_device
from prefloss.testing.values import check_empty_examples as check_empty_examples
from prefloss.testing.values import check_no_mutation as check_no_mutation
from prefloss.testing.values import check_padding as check_padding
from prefloss.testing.values import check_scores as check_scores
from prefloss.testing.values import check_shape_and_dtype as check_shape_and_dtype
from prefloss.testing.values import check_single_example as check_single_example
from prefloss.testing.values import check_ties as check_ties
from prefloss.testing.values import check_weights as check_weights
