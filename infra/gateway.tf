# API Gateway itself. In a new project its agent is there before its role is.

resource "google_project_service_identity" "gateway" {
  provider = google-beta

  service = "apigateway.googleapis.com"

  depends_on = [google_project_service.used]
}

resource "google_project_iam_member" "gateway_agent" {
  project = var.project_id
  role    = "roles/apigateway.serviceAgent"
  # By its name: of some services the resource that makes the account does not tell it.
  member = "serviceAccount:service-${data.google_project.this.number}@gcp-sa-apigateway.iam.gserviceaccount.com"

  depends_on = [google_project_service_identity.gateway]
}

resource "google_api_gateway_api" "exports" {
  provider = google-beta

  api_id = "gemma-export"

  depends_on = [google_project_service.used, google_project_iam_member.gateway_agent]
}

resource "google_api_gateway_api_config" "exports" {
  provider = google-beta

  api                  = google_api_gateway_api.exports.api_id
  api_config_id_prefix = "gemma-export-"

  openapi_documents {
    document {
      path = "openapi.yaml"
      contents = base64encode(templatefile("${path.module}/openapi.yaml", {
        backend_url   = google_cloud_run_v2_service.function["export_api"].uri
        jwt_issuer    = local.jwt.issuer
        jwt_jwks_uri  = local.jwt.jwks_url
        jwt_audiences = local.jwt.audience
      }))
    }
  }

  gateway_config {
    backend_config {
      google_service_account = google_service_account.invoker["gateway"].email
    }
  }

  lifecycle {
    create_before_destroy = true # the gateway has one at any moment
  }
}

resource "google_api_gateway_gateway" "exports" {
  provider = google-beta

  gateway_id = "gemma-export"
  api_config = google_api_gateway_api_config.exports.id
  region     = coalesce(var.gateway_region, var.region)
}
