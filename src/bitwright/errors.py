"""Every error that bitwright raises on purpose.

A message says what was asked, what was found and what to do, and names the site (``layer1.0.conv1.weight``).

::

    BitwrightError
    ├── SpecError         a format, granularity or spec text that does not exist or contradicts itself
    ├── NumericsError     values that cannot be quantized (NaN, infinity, wrong shape)
    ├── PlanError         a plan that names unknown sites, does not fit the model, or the target cannot run
    ├── ModelError        a model that cannot be prepared (nothing to quantize, unknown layer class, half precision)
    ├── CalibrationError  calibration that saw no data, bad data, or never reached a module
    ├── SearchError       a search that cannot be set up, a budget that nothing meets
    ├── CertificateError  a certificate that cannot be issued, or is no longer what was issued
    ├── TrainingError     a training run that cannot be set up or went wrong
    ├── KernelError       a kernel called with arguments it cannot serve
    ├── CheckpointError   a folder that is missing, corrupt, foreign, or does not fit the model
    ├── ExportError       a model or operator that the export format cannot express
    └── MissingExtraError an optional dependency that is not installed
"""


class BitwrightError(Exception):
    """Base of all errors raised on purpose."""


class SpecError(BitwrightError):
    """A format, granularity or spec that does not exist or contradicts itself."""


class NumericsError(BitwrightError):
    """Values that cannot be quantized."""


class PlanError(BitwrightError):
    """A plan that does not fit the model or the target."""


class ModelError(BitwrightError):
    """A model that cannot be prepared."""


class CalibrationError(BitwrightError):
    """Calibration without data, with bad data, or with modules that never ran."""


class SearchError(BitwrightError):
    """A search that cannot be set up, or a budget that nothing meets."""


class CertificateError(BitwrightError):
    """A certificate that cannot be issued, or is no longer what was issued."""


class TrainingError(BitwrightError):
    """A training run that cannot be set up or went wrong."""


class KernelError(BitwrightError):
    """A kernel called with arguments it cannot serve."""


class CheckpointError(BitwrightError):
    """A checkpoint that is missing, corrupt, foreign, or does not fit the model."""


class ExportError(BitwrightError):
    """A model that the export format cannot express."""


class MissingExtraError(BitwrightError):
    """An optional dependency that is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed; run: pip install 'bitwright[{extra}]'")
