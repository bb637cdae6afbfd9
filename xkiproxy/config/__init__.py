"""xkiproxy.toml: its models, its loading and the secrets it points to."""

from xkiproxy.config.loading import (
    ConfigError,
    Problem,
    load_config,
    parse_config,
    read_document,
)
from xkiproxy.config.models import Config

__all__ = ["Config", "ConfigError", "Problem", "load_config", "parse_config", "read_document"]
