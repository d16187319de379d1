"""What is claimed of a shipped model, with its confidence: certificates, their check, tables of versions."""
