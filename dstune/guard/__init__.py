"""What stands in front of models: text is normalised, decoded, searched and scored before it goes in or out."""
