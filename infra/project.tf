data "google_project" "this" {
  project_id = var.project_id
}

locals {
  labels = merge(var.labels, { app = "gemma-export" })
  bucket = coalesce(var.bucket_name, "${var.project_id}-gemma-export")
  topic  = "gemma-export"
  job    = "gemma-exporter"

  # Until the first build has pushed ours; then the build deploys them by digest, and Terraform leaves them alone.
  placeholder = {
    service = "us-docker.pkg.dev/cloudrun/container/hello"
    job     = "us-docker.pkg.dev/cloudrun/container/job"
  }

  jwt = {
    issuer   = coalesce(var.jwt_issuer, "https://securetoken.google.com/${var.project_id}")
    jwks_url = coalesce(var.jwt_jwks_url, "https://www.googleapis.com/service_accounts/v1/jwk/securetoken@system.gserviceaccount.com")
    audience = coalesce(var.jwt_audience, var.project_id)
  }

  # What every process of the deployment is told; the names are those that dispatcher/settings.py reads.
  settings = {
    PROJECT_ID             = var.project_id
    GCS_EXPORT_BUCKET_NAME = google_storage_bucket.artifacts.name
    REGION                 = var.region
    EXPORTER_JOB           = local.job
    EXPORT_TOPIC           = google_pubsub_topic.jobs.name
    RECORDS_URL            = "firestore://${var.project_id}/${var.firestore_database}"
    GEMMA_EXPORT_HOME      = "/tmp/gemma-export"
    LEASE_SECONDS          = var.lease_seconds
    CLOCK_SKEW_SECONDS     = var.clock_skew_seconds
    MAX_ATTEMPTS           = var.max_attempts
    TOKEN_TTL_SECONDS      = var.message_retention_days * 24 * 3600
    COLLECT_AFTER_SECONDS  = var.collect_after_days * 24 * 3600
  }
}

resource "google_project_service" "used" {
  for_each = toset([
    "apigateway.googleapis.com",
    "artifactregistry.googleapis.com",
    "billingbudgets.googleapis.com",
    "cloudbilling.googleapis.com",
    "cloudbuild.googleapis.com",
    "cloudresourcemanager.googleapis.com",
    "cloudscheduler.googleapis.com",
    "firestore.googleapis.com",
    "iam.googleapis.com",
    "iamcredentials.googleapis.com",
    "logging.googleapis.com",
    "monitoring.googleapis.com",
    "pubsub.googleapis.com",
    "run.googleapis.com",
    "secretmanager.googleapis.com",
    "servicecontrol.googleapis.com",
    "servicemanagement.googleapis.com",
    "serviceusage.googleapis.com",
    "storage.googleapis.com",
  ])

  service            = each.key
  disable_on_destroy = false # something else in the project may use it
}
