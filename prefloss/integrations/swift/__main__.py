"""Print the path of the plugin, for `swift rlhf --external_plugins`."""

from prefloss.integrations.swift import PLUGIN

if __name__ == "__main__":
    print(PLUGIN)
