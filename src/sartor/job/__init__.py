"""What the user asks for: one YAML file, strictly read."""

from sartor.job.load import from_mapping, has_data, load, to_mapping, to_yaml
from sartor.job.schema import Job

__all__ = ["Job", "from_mapping", "has_data", "load", "to_mapping", "to_yaml"]
