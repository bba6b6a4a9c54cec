output "api_url" {
  description = "Where callers reach the API."
  value       = "https://${google_api_gateway_gateway.exports.default_hostname}"
}

output "bucket" {
  description = "The bucket of artifacts."
  value       = google_storage_bucket.artifacts.name
}

output "job" {
  description = "The Cloud Run job, for `gcloud run jobs execute`."
  value       = google_cloud_run_v2_job.exporter.name
}

output "functions" {
  description = "The Cloud Run service of each function."
  value       = { for target, service in google_cloud_run_v2_service.function : target => service.name }
}

output "subscriptions" {
  description = "What can be replayed, and where dead letters can be read."
  value = {
    start        = google_pubsub_subscription.start.name
    dead_letters = google_pubsub_subscription.dead_letters.name
  }
}

output "service_accounts" {
  description = "As whom the parts run, for `gemma-export doctor --as`."
  value       = { for name, account in google_service_account.runtime : name => account.email }
}

output "build" {
  description = "The second command: builds, tests and deploys both images."
  value = join(" ", [
    "gcloud builds submit",
    "--project=${var.project_id}",
    "--region=${coalesce(var.build_region, var.region)}",
    "--config=cloudbuild.yaml",
    "--gcs-source-staging-dir=gs://${google_storage_bucket.builds.name}/source",
    "--substitutions=_REGION=${var.region},_VARIANT=${var.gpu ? "gpu" : "cpu"}",
  ])
}

output "doctor" {
  description = "Asks whether all of it is there, with the credentials at hand; `--as exporter` and the like come after it."
  value = join(" ", concat(
    # Without the caller's own: they are of another machine's exporter.
    ["env -u HF_ENDPOINT -u HF_HUB_OFFLINE -u TRANSFORMERS_OFFLINE -u HF_TOKEN"],
    [for name, value in merge(local.function_settings, local.exporter_settings) : "${name}='${replace(tostring(value), "'", "'\\''")}'"],
    ["gemma-export doctor"],
    [for source in concat(["gs://${local.bucket}/adapters"], var.adapter_sources) : "--adapters '${replace(source, "'", "'\\''")}'"],
  ))
}
