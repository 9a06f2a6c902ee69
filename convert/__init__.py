"""The conversion layer: from base weights and labelled text to an INT4 bundle. Run from a checkout."""
