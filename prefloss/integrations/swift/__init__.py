"""prefloss in ms-swift: `--loss_type` may name any registered loss, for `--rlhf_type dpo` and `kto`.

    swift rlhf --external_plugins "$(python -m prefloss.integrations.swift)" --loss_type "simpo(beta=2.0)" ...

`python -m prefloss.integrations.swift` prints the path of the plugin. A run whose names are all ms-swift's own is left
to ms-swift.
"""

from pathlib import Path

PLUGIN = Path(__file__).with_name("prefloss_swift_plugin.py")
