"""Tests for packages with a provider of their own: `pip install 'anybatch[testing]'`.

Subclass `ProviderSuite` in a test module; it needs the provider's name and a fake server of its wire format.
"""

from .driver import MODES, QUICK, Driver
from .pauses import shorten_pauses
from .serving import serve
from .suite import ProviderSuite
from .wire import Fake, Wire

__all__ = ["MODES", "QUICK", "Driver", "Fake", "ProviderSuite", "Wire", "serve", "shorten_pauses"]
