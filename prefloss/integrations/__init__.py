"""Thin translations from trainers to prefloss; each module alone imports its trainer. No loss maths lives here."""
