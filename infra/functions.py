"""The dispatcher's functions, and what functions-framework is told of each; a test holds Terraform to the same."""

SIGNATURES = {"export_api": "http", "start_export": "cloudevent", "fail_export": "cloudevent", "sweep": "http"}
"""`FUNCTION_SIGNATURE_TYPE`, by `FUNCTION_TARGET`"""
