"""The file that `swift rlhf --external_plugins` reads; ms-swift imports it by its path."""

from prefloss.integrations.swift.trainers import register

register()
