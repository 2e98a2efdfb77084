"""prefloss on the causal language models of transformers: completion log-probs without their logits."""

try:
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    # A fault inside transformers is not a missing transformers.
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        "prefloss.integrations.transformers needs transformers: pip install 'prefloss[transformers]'",
        name="transformers",
    ) from error

from prefloss.integrations.transformers._forward import ModelLogps as ModelLogps
from prefloss.integrations.transformers._forward import model_logps as model_logps
from prefloss.integrations.transformers._head import HeadSpec as HeadSpec
