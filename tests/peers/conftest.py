from importlib.metadata import version

import pytest
from peer_figures import FIGURES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    names = ("sae-lens", "eai-sparsify", "torch", "transformers")
    terminalreporter.write_line(", ".join(f"{name} {version(name)}" for name in names))
    terminalreporter.write_line("largest difference of a latent (largest latent)")
    for name, difference, largest in FIGURES:
        terminalreporter.write_line(f"{difference:10.2e}  ({largest:6.2f})  {name}")
