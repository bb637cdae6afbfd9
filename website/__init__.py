"""What makes the documentation's site: the references, and what the generator does not check.

The pages are in `docs/`, their order is in `zensical.toml`. This is outside of the package.
"""
