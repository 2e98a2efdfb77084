"""What goes wrong in a training, reported in plain words while it runs; torch only, for every trainer."""

from prefloss.diagnosis.figures import NAMES as NAMES
from prefloss.diagnosis.findings import Diagnosis as Diagnosis
from prefloss.diagnosis.findings import DiagnosisWarning as DiagnosisWarning
from prefloss.diagnosis.findings import Finding as Finding
from prefloss.diagnosis.findings import Thresholds as Thresholds
from prefloss.diagnosis.findings import config_of as config_of
from prefloss.diagnosis.findings import resisting as resisting
from prefloss.diagnosis.findings import resists_falling as resists_falling
